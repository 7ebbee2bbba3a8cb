package org.sealwright.edge;

import java.nio.ByteBuffer;
import java.security.SecureRandom;
import org.bouncycastle.crypto.SecretWithEncapsulation;
import org.bouncycastle.crypto.digests.SHA256Digest;
import org.bouncycastle.crypto.digests.SHA3Digest;
import org.bouncycastle.crypto.macs.HMac;
import org.bouncycastle.crypto.params.KeyParameter;
import org.bouncycastle.crypto.params.X25519PrivateKeyParameters;
import org.bouncycastle.crypto.params.X25519PublicKeyParameters;
import org.bouncycastle.pqc.crypto.mlkem.MLKEMGenerator;
import org.bouncycastle.pqc.crypto.mlkem.MLKEMParameters;
import org.bouncycastle.pqc.crypto.mlkem.MLKEMPublicKeyParameters;

/**
 * Sealing to a hybrid key: HPKE (RFC 9180) in base mode with X-Wing (ML-KEM-768 and X25519), HKDF-SHA256, AES-256-GCM.
 * A device only seals; opening is the gateways'.
 */
final class Hybrid {
    static final int PUBLIC_SIZE = 1184 + 32;
    private static final int MLKEM_PUBLIC = 1184;
    private static final byte[] SUITE = Bytes.join(Bytes.utf8("HPKE"), Bytes.unhex("647a00010002"));
    private static final byte[] VERSION = Bytes.utf8("HPKE-v1");
    private static final byte[] XWING_LABEL = Bytes.unhex("5c2e2f2f5e5c");
    private static final byte[] NONE = new byte[0];

    private Hybrid() {}

    /** The encapsulated key (1,120 bytes), then the ciphertext. Raises Refused for a public key that is none. */
    static byte[] seal(byte[] plain, byte[] publicKey, byte[] info, SecureRandom random) {
        if (publicKey.length != PUBLIC_SIZE) throw new Refused("a hybrid public key has " + PUBLIC_SIZE + " bytes");
        byte[] x25519 = Bytes.cut(publicKey, MLKEM_PUBLIC, PUBLIC_SIZE);
        byte[] mlkemSecret;
        byte[] encapsulated;
        byte[] shared = new byte[32];
        X25519PrivateKeyParameters once = new X25519PrivateKeyParameters(random);
        byte[] oncePublic = once.generatePublicKey().getEncoded();
        try {
            SecretWithEncapsulation made = new MLKEMGenerator(random).generateEncapsulated(
                    new MLKEMPublicKeyParameters(MLKEMParameters.ml_kem_768, Bytes.cut(publicKey, 0, MLKEM_PUBLIC)));
            mlkemSecret = made.getSecret();
            encapsulated = made.getEncapsulation();
            once.generateSecret(new X25519PublicKeyParameters(x25519, 0), shared, 0);
        } catch (IllegalArgumentException | IllegalStateException error) {
            throw new Refused("the hybrid public key is malformed");
        }
        byte[] secret = sha3(mlkemSecret, shared, oncePublic, x25519, XWING_LABEL);
        byte[] context = Bytes.join(
                new byte[] {0}, extract(NONE, "psk_id_hash", NONE), extract(NONE, "info_hash", info));
        byte[] root = extract(secret, "secret", NONE);
        byte[] key = expand(root, "key", context, 32);
        byte[] nonce = expand(root, "base_nonce", context, Crypto.NONCE_SIZE);
        return Bytes.join(encapsulated, oncePublic, Crypto.encrypt(key, nonce, plain, NONE));
    }

    private static byte[] sha3(byte[]... parts) {
        SHA3Digest digest = new SHA3Digest(256);
        for (byte[] part : parts) digest.update(part, 0, part.length);
        byte[] found = new byte[32];
        digest.doFinal(found, 0);
        return found;
    }

    private static byte[] extract(byte[] salt, String label, byte[] input) {
        return hmac(salt.length == 0 ? new byte[32] : salt, VERSION, SUITE, Bytes.utf8(label), input);
    }

    /** At most 32 bytes: one block of HKDF's expansion. */
    private static byte[] expand(byte[] key, String label, byte[] info, int size) {
        byte[] length = ByteBuffer.allocate(2).putShort((short) size).array();
        return Bytes.cut(hmac(key, length, VERSION, SUITE, Bytes.utf8(label), info, new byte[] {1}), 0, size);
    }

    private static byte[] hmac(byte[] key, byte[]... parts) {
        HMac mac = new HMac(new SHA256Digest());
        mac.init(new KeyParameter(key));
        for (byte[] part : parts) mac.update(part, 0, part.length);
        byte[] found = new byte[32];
        mac.doFinal(found, 0);
        return found;
    }
}
