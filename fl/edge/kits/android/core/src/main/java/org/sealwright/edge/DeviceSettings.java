package org.sealwright.edge;

import java.util.Collections;
import java.util.List;
import java.util.Map;

/** What an app decides. {@code jobs}: names, or their beginning and {@code *}, in which it takes part. */
public final class DeviceSettings {
    public final List<String> jobs;
    public Map<String, String> capabilities = Collections.emptyMap();
    public Deltas.Encoding encoding = Deltas.Encoding.BF16;
    public boolean compressed;
    /** How long a gateway may hold back the answer to a request for a task. */
    public double waitSeconds = 20;
    /** While it trains, a device asks so often whether its version is still trained. */
    public double selectionSeconds = 30;
    /** What the app applies to every model before training, before what a task's configuration names, */
    public List<Filter> filtersIn = Collections.emptyList();
    /** and to every difference before it is sent, after what a task's configuration names. */
    public List<Filter> filtersOut = Collections.emptyList();

    public DeviceSettings(List<String> jobs) { this.jobs = jobs; }
}
