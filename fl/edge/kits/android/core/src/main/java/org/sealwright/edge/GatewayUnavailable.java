package org.sealwright.edge;

/** No gateway answers, or none has room: {@code seconds} is how long it asks to be left alone (0: it does not say). */
public final class GatewayUnavailable extends Refused {
    private static final long serialVersionUID = 1L;
    public final double seconds;

    public GatewayUnavailable(String what, double seconds) {
        super(what);
        this.seconds = seconds;
    }

    public GatewayUnavailable(String what) { this(what, 0); }
}
