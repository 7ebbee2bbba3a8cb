package org.sealwright.edge;

import java.util.Map;

/** Hears of joined, task, trained, dropped, reported, refused, waiting and over, with details. */
public interface Event {
    void heard(String name, Map<String, Object> details);
}
