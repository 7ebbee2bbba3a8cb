package org.sealwright.edge;

import java.nio.ByteBuffer;
import java.security.GeneralSecurityException;
import java.security.SecureRandom;

/** How messages are sealed: requests to the gateways' group key, answers under a key of the request's own. */
public final class Sealing {
    private static final byte[] REQUEST = Bytes.utf8("sealwright-edge-request-v1\0");
    private static final byte[] SIGNED = Bytes.utf8("sealwright-edge-signed-v1\0");
    private static final byte[] ANSWER = Bytes.utf8("sealwright-edge-answer-v1\0");

    private Sealing() {}

    /** The id of a group key: SHA-256 of its raw public key. */
    public static byte[] keyId(byte[] groupKey) { return Crypto.sha256(groupKey); }

    /** The body of a request: signed by the device's key, sealed to the group key. {@code charter}: its id in hex. */
    public static byte[] sealRequest(
            Protocol.Message message, byte[] words, byte[] tensors, DeviceKey key, byte[] groupKey, String charter,
            SecureRandom random) {
        byte[] length = ByteBuffer.allocate(4).putInt(words.length).array();
        byte[] content = Bytes.join(length, words, tensors);
        byte[] about = Bytes.join(Bytes.unhex(charter), Bytes.utf8(message.word() + "\0"));
        byte[] signature = key.sign(Bytes.join(SIGNED, about, content));
        byte[] id = keyId(groupKey);
        byte[] info = Bytes.join(REQUEST, about, id);
        return Bytes.join(id, Hybrid.seal(Bytes.join(content, signature), groupKey, info, random));
    }

    /** The words of an answer to the request with this id. Raises Refused. */
    public static byte[] openAnswer(byte[] body, byte[] answerKey, String request) {
        try {
            if (body.length <= Crypto.NONCE_SIZE + Crypto.TAG_SIZE
                    || body.length > Answer.MAX_WORDS + Crypto.NONCE_SIZE + Crypto.TAG_SIZE) {
                throw new GeneralSecurityException();
            }
            byte[] nonce = Bytes.cut(body, 0, Crypto.NONCE_SIZE);
            byte[] sealed = Bytes.cut(body, Crypto.NONCE_SIZE, body.length);
            return Crypto.decrypt(answerKey, nonce, sealed, Bytes.join(ANSWER, Bytes.unhex(request)));
        } catch (GeneralSecurityException error) {
            throw new Refused("the answer is none to this request, or was changed on its way");
        }
    }

    /** The content of a blob. Raises Refused if it is not what the gateway named. */
    public static byte[] openBlob(Blob blob, byte[] sealed) {
        try {
            if (!Crypto.same(Bytes.hex(Crypto.sha256(sealed)), blob.id)) throw new GeneralSecurityException();
            byte[] none = new byte[Crypto.NONCE_SIZE]; // a blob's key is used once
            byte[] content = Crypto.decrypt(Bytes.unhex(blob.key), none, sealed, new byte[0]);
            if (content.length != blob.size || !Crypto.same(Bytes.hex(Crypto.sha256(content)), blob.sha256)) {
                throw new GeneralSecurityException();
            }
            return content;
        } catch (GeneralSecurityException error) {
            throw new Refused("a blob is not what the gateway named");
        }
    }
}
