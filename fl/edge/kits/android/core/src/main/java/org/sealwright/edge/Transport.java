package org.sealwright.edge;

import java.io.IOException;
import java.util.Map;

/** HTTPS to whoever answers at the gateways' address. Nothing that it brings is believed. */
public interface Transport {
    /** What came back: {@code body} is what came before a cut, if {@code whole} is false. */
    final class Response {
        public final int status;
        /** By lower-case name. */
        public final Map<String, String> headers;
        public final byte[] body;
        public final boolean whole;

        public Response(int status, Map<String, String> headers, byte[] body, boolean whole) {
            this.status = status;
            this.headers = headers;
            this.body = body;
            this.whole = whole;
        }
    }

    /**
     * One call, bounded in time: {@code path} begins below the gateways' address; {@code body} null: none. Follows no
     * redirects. Raises IOException if nothing came, or more than {@code limit} bytes.
     */
    Response call(String method, String path, Map<String, String> headers, byte[] body, long limit) throws IOException;
}
