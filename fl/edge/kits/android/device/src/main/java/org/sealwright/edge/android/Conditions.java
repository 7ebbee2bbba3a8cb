package org.sealwright.edge.android;

import android.content.Context;
import android.net.ConnectivityManager;
import android.net.NetworkCapabilities;
import android.os.BatteryManager;
import android.os.PowerManager;
import org.sealwright.edge.Condition;

/** When a phone may work. */
public final class Conditions {
    private Conditions() {}

    /** On the charger, or with at least this much of its battery, and not saving power. */
    public static Condition battery(Context context, int percent) {
        BatteryManager battery = context.getSystemService(BatteryManager.class);
        PowerManager power = context.getSystemService(PowerManager.class);
        return () -> {
            if (power.isPowerSaveMode()) return "the phone saves power";
            if (battery.isCharging()) return null;
            int left = battery.getIntProperty(BatteryManager.BATTERY_PROPERTY_CAPACITY);
            return left < percent ? "the battery is at " + left + "%, below " + percent + "%" : null;
        };
    }

    /** On a network that is not metered. */
    public static Condition network(Context context) {
        ConnectivityManager networks = context.getSystemService(ConnectivityManager.class);
        return () -> {
            NetworkCapabilities here = networks.getNetworkCapabilities(networks.getActiveNetwork());
            if (here == null) return "there is no network";
            boolean free = here.hasCapability(NetworkCapabilities.NET_CAPABILITY_NOT_METERED);
            return free ? null : "the network is metered";
        };
    }
}
