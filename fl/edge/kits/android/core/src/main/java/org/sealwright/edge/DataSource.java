package org.sealwright.edge;

import java.util.Map;

/** Where an app's examples are. */
public interface DataSource {
    /** The examples for the job of this name, with the task's configuration. */
    Dataset dataset(String job, Map<String, Object> config);
}
