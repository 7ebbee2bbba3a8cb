package org.sealwright.edge.android;

import android.content.Context;
import android.util.Log;
import androidx.annotation.NonNull;
import androidx.work.Constraints;
import androidx.work.NetworkType;
import androidx.work.PeriodicWorkRequest;
import androidx.work.Worker;
import androidx.work.WorkerParameters;
import java.util.concurrent.TimeUnit;
import org.sealwright.edge.Device;
import org.sealwright.edge.Protocol;

/** Work in the background: WorkManager wakes it when the phone may work, and it goes on where it was. */
public abstract class DeviceWorker extends Worker {
    private static final long MILLISECONDS = 1000;

    protected DeviceWorker(@NonNull Context context, @NonNull WorkerParameters parameters) { super(context, parameters); }

    /** The app's device. */
    protected abstract Device device() throws Exception;

    @NonNull
    @Override
    public Result doWork() {
        try {
            Device device = device();
            while (!isStopped() && device.standing().state != Protocol.State.OVER) {
                double seconds = device.step();
                if (device.standing().state == Protocol.State.JOINED && seconds > 60) return Result.success();
                Thread.sleep((long) (MILLISECONDS * seconds));
            }
            return Result.success();
        } catch (InterruptedException error) {
            Thread.currentThread().interrupt();
            return Result.retry();
        } catch (Exception error) {
            Log.w("edge", "the device cannot work", error);
            return Result.failure();
        }
    }

    /** When it is to be woken: charging, and on a network that is not metered. */
    public static PeriodicWorkRequest request(Class<? extends DeviceWorker> worker) {
        Constraints constraints = new Constraints.Builder()
                .setRequiresCharging(true)
                .setRequiredNetworkType(NetworkType.UNMETERED)
                .build();
        return new PeriodicWorkRequest.Builder(worker, 1, TimeUnit.HOURS).setConstraints(constraints).build();
    }
}
