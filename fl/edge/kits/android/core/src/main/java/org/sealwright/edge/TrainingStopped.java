package org.sealwright.edge;

/** The task is to be trained no further. */
public final class TrainingStopped extends RuntimeException {
    private static final long serialVersionUID = 1L;

    public TrainingStopped(String why) { super(why); }
}
