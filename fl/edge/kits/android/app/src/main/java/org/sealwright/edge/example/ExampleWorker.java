package org.sealwright.edge.example;

import android.content.Context;
import android.util.Log;
import androidx.annotation.NonNull;
import androidx.work.WorkerParameters;
import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.time.Clock;
import java.util.Collections;
import org.sealwright.edge.ComponentResolver;
import org.sealwright.edge.Condition;
import org.sealwright.edge.Device;
import org.sealwright.edge.DeviceSettings;
import org.sealwright.edge.GatewayConnection;
import org.sealwright.edge.Trust;
import org.sealwright.edge.android.Conditions;
import org.sealwright.edge.android.DeviceWorker;
import org.sealwright.edge.android.ExecuTorchTrainer;
import org.sealwright.edge.android.KeystoreKey;
import org.sealwright.edge.android.OkHttpTransport;

/** The example's device. Its assets hold 1.root.json, the gateways' address and the token. */
public final class ExampleWorker extends DeviceWorker {
    private static final int MAX_ASSET = 1 << 20;

    public ExampleWorker(@NonNull Context context, @NonNull WorkerParameters parameters) { super(context, parameters); }

    @Override
    protected Device device() throws Exception {
        Context context = getApplicationContext();
        DeviceSettings settings = new DeviceSettings(Collections.singletonList("heart-*"));
        settings.capabilities = Collections.singletonMap("os", "android");
        return new Device(
                new GatewayConnection(new OkHttpTransport(new String(asset("gateways.txt")).trim())),
                new Trust(asset("1.root.json"), true),
                new String(asset("token.txt")).trim(),
                KeystoreKey.get(),
                (job, config) -> new HeartRates(),
                new ComponentResolver().trainer("executorch", new ExecuTorchTrainer(context.getCacheDir())),
                new File(context.getNoBackupFilesDir(), "edge").toPath(),
                settings,
                Condition.all(Conditions.battery(context, 50), Conditions.network(context)),
                (name, details) -> Log.i("edge", name + " " + details),
                Clock.systemUTC());
    }

    private byte[] asset(String name) throws IOException {
        try (InputStream stream = getApplicationContext().getAssets().open(name)) {
            byte[] content = new byte[Math.min(stream.available(), MAX_ASSET)];
            int read = 0;
            for (int count; read < content.length && (count = stream.read(content, read, content.length - read)) > 0; ) {
                read += count;
            }
            return content;
        }
    }
}
