package org.sealwright.edge;

import java.time.Instant;

/** An attested gateway, and the group key to which messages are sealed. {@code until}: when its EARs end. */
public final class GatewayProof {
    public final String name;
    public final Instant until;
    final byte[] groupKey;

    GatewayProof(String name, byte[] groupKey, Instant until) {
        this.name = name;
        this.groupKey = groupKey;
        this.until = until;
    }
}
