package org.sealwright.edge;

import java.io.IOException;
import java.util.Collections;
import java.util.LinkedHashMap;
import java.util.Map;

/** A device's way to gateways: the routes of the protocol over a transport, bounded in size. */
public final class GatewayConnection {
    static final String PREFIX = "/edge/v1";
    private static final String SEALED = "application/octet-stream";
    private static final long MAX_CHARTER = 32L << 20;
    private static final long MAX_PROOF = 128 << 10;
    private static final long MAX_ANSWER = Answer.MAX_WORDS + 64;
    private static final int PIECE = 1 << 20;
    private static final Map<String, String> NONE = Collections.emptyMap();

    private final Transport transport;

    public GatewayConnection(Transport transport) { this.transport = transport; }

    /** The charter's files; null if there is none above this version. */
    byte[] charter(Long above) {
        String query = above == null ? "" : "?above=" + above;
        Transport.Response response = call("GET", "/charter" + query, NONE, null, MAX_CHARTER, true);
        return response.status == 204 ? null : done(response);
    }

    /** The gateway's introduction over our nonce. */
    byte[] proof(String nonce) {
        byte[] asked = CanonicalJson.write(Collections.singletonMap("nonce", nonce));
        return done(call("POST", "/proof", header("Content-Type", "application/json"), asked, MAX_PROOF, true));
    }

    /** The sealed answer to a sealed request. */
    byte[] send(Protocol.Message message, byte[] sealed) {
        return done(call("POST", "/" + message.word(), header("Content-Type", SEALED), sealed, MAX_ANSWER, true));
    }

    /** More of a sealed blob of which {@code have} is here: one byte at least. */
    byte[] blob(Blob blob, byte[] have) {
        long most = blob.size + Crypto.TAG_SIZE;
        Map<String, String> headers = have.length == 0 ? NONE : header("Range", "bytes=" + have.length + "-");
        Transport.Response response = call("GET", "/blobs/" + blob.id, headers, null, most, false);
        if (response.status == 200) return response.body;
        String range = response.headers.getOrDefault("content-range", "");
        if (response.status != 206) return done(response);
        if (!range.startsWith("bytes " + have.length + "-") || response.body.length == 0) {
            throw new Refused("the gateway answers with another range");
        }
        byte[] all = Bytes.join(have, response.body);
        return all.length > most ? Bytes.cut(all, 0, (int) most) : all;
    }

    /** Send a sealed result in pieces, from where it was broken off; its sealed answer. Call again to go on. */
    byte[] upload(byte[] sealed, String ticket) {
        String path = "/uploads/" + Bytes.hex(Crypto.sha256(sealed));
        Map<String, String> headers = header("Upload-Ticket", ticket);
        headers.put("Content-Type", SEALED);
        headers.put("Upload-Length", String.valueOf(sealed.length));
        Map<String, String> asking = header("Upload-Ticket", ticket);
        int at = offset(done(call("GET", path, asking, null, MAX_ANSWER, true)), sealed.length);
        while (true) {
            headers.put("Upload-Offset", String.valueOf(at));
            byte[] piece = Bytes.cut(sealed, at, Math.min(at + PIECE, sealed.length));
            Transport.Response response = call("PUT", path, headers, piece, MAX_ANSWER, true);
            if (response.status != 202 && response.status != 409) return done(response);
            int before = at;
            at = offset(response.body, sealed.length);
            if (at <= before && response.status == 202) {
                throw new GatewayUnavailable("the gateway takes no further pieces");
            }
        }
    }

    private static int offset(byte[] body, int most) {
        try {
            return (int) new Fields(Json.read(body, (int) MAX_ANSWER), "upload").integer("offset", 0, most);
        } catch (Refused error) {
            throw new GatewayUnavailable("the gateway names no offset");
        }
    }

    private static Map<String, String> header(String name, String value) {
        Map<String, String> headers = new LinkedHashMap<>();
        headers.put(name, value);
        return headers;
    }

    private Transport.Response call(
            String method, String path, Map<String, String> headers, byte[] body, long limit, boolean whole) {
        Transport.Response response;
        try {
            response = transport.call(method, PREFIX + path, headers, body, limit);
        } catch (IOException error) {
            throw new GatewayUnavailable("no gateway answers: " + error.getClass().getSimpleName());
        }
        if (!response.whole && (whole || response.body.length == 0)) {
            throw new GatewayUnavailable("the answer broke off");
        }
        if (response.status == 503) {
            String after = response.headers.getOrDefault("retry-after", "0");
            throw new GatewayUnavailable("the gateway has no room", after.matches("\\d{1,6}") ? Long.parseLong(after) : 0);
        }
        return response;
    }

    private static byte[] done(Transport.Response response) {
        if (response.status == 200) return response.body;
        if (response.status == 410) throw new KeyRotated();
        throw new Refused("the gateway answers HTTP " + response.status + ": " + what(response.body));
    }

    private static String what(byte[] body) {
        try {
            Fields error = new Fields(Json.read(body, (int) MAX_ANSWER), "answer").fields("error");
            String what = error.text("what", Fields.ANY);
            return what.substring(0, Math.min(what.length(), 200));
        } catch (Refused error) {
            return "without saying why";
        }
    }
}
