package org.sealwright.edge;

/** The group key is gone: ask for the gateway's proof again. */
public final class KeyRotated extends Refused {
    private static final long serialVersionUID = 1L;

    public KeyRotated() { super("the gateways have another group key now"); }
}
