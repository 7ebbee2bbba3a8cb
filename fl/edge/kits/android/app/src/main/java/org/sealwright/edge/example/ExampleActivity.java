package org.sealwright.edge.example;

import android.app.Activity;
import android.os.Bundle;
import android.util.Base64;
import android.widget.TextView;
import androidx.work.ExistingPeriodicWorkPolicy;
import androidx.work.WorkManager;
import java.io.IOException;
import java.security.GeneralSecurityException;
import org.sealwright.edge.android.DeviceWorker;
import org.sealwright.edge.android.KeystoreKey;

/** Shows the device's public key, which the app's own service has a token issued for, and lets it work. */
public final class ExampleActivity extends Activity {
    private static final String WORK = "sealwright-edge";

    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        TextView text = new TextView(this);
        text.setTextIsSelectable(true);
        setContentView(text);
        try {
            text.setText(Base64.encodeToString(KeystoreKey.publicKey(), Base64.NO_WRAP));
        } catch (GeneralSecurityException | IOException error) {
            text.setText("This phone cannot make a key: " + error.getClass().getSimpleName());
            return;
        }
        WorkManager.getInstance(this).enqueueUniquePeriodicWork(
                WORK, ExistingPeriodicWorkPolicy.KEEP, DeviceWorker.request(ExampleWorker.class));
    }
}
