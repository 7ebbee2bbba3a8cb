package org.sealwright.edge;

/** Whether a device may work now: battery, network, use. */
public interface Condition {
    /** Why it shall not; null if it may. */
    String why();

    /** The first reason of several conditions. */
    static Condition all(Condition... conditions) {
        return () -> {
            for (Condition one : conditions) {
                String why = one.why();
                if (why != null) return why;
            }
            return null;
        };
    }
}
