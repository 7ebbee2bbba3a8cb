package org.sealwright.edge;

import java.util.Map;

/** Signed JSON: compact JWS with Ed25519, one header form, canonical payloads. A key is never taken from a token. */
final class Jws {
    private static final int MAX_HEADER = 1024;
    private static final int MAX_TOKEN = 256 * 1024;

    private Jws() {}

    /** The {@code kid} of a token of this type. Raises Refused. */
    static String signer(String token, String type) {
        String[] parts = token.split("\\.", -1);
        if (token.length() > MAX_TOKEN || parts.length != 3) throw new Refused("this is no compact JWS");
        Map<String, Object> header = Json.readCanonical(Bytes.unb64url(parts[0]), MAX_HEADER);
        Object kid = header.get("kid");
        if (header.size() != 3 || !"Ed25519".equals(header.get("alg")) || !type.equals(header.get("typ"))
                || !(kid instanceof String)) {
            throw new Refused("the token's header is not exactly alg Ed25519, kid, typ " + type);
        }
        return (String) kid;
    }

    /** The payload of a token of this type that the raw key signed. Raises Refused. */
    static Map<String, Object> read(String token, byte[] key, String type) {
        signer(token, type);
        int end = token.lastIndexOf('.');
        String signed = token.substring(0, end);
        byte[] payload = Bytes.unb64url(signed.substring(signed.indexOf('.') + 1));
        if (!Crypto.isSigned(key, Bytes.utf8(signed), Bytes.unb64url(token.substring(end + 1)))) {
            throw new Refused("the signature does not verify");
        }
        return Json.readCanonical(payload, MAX_TOKEN);
    }
}
