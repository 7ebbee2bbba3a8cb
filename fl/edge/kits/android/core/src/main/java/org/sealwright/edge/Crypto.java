package org.sealwright.edge;

import java.security.GeneralSecurityException;
import java.security.MessageDigest;
import javax.crypto.Cipher;
import javax.crypto.spec.GCMParameterSpec;
import javax.crypto.spec.SecretKeySpec;
import org.bouncycastle.crypto.params.Ed25519PublicKeyParameters;
import org.bouncycastle.crypto.signers.Ed25519Signer;

/** The primitives: AES-GCM and SHA-256 are the platform's (fast on phones), what API 29 lacks is Bouncy Castle's. */
final class Crypto {
    static final int NONCE_SIZE = 12;
    static final int TAG_SIZE = 16;

    private Crypto() {}

    static byte[] sha256(byte[]... parts) {
        try {
            MessageDigest digest = MessageDigest.getInstance("SHA-256");
            for (byte[] part : parts) digest.update(part);
            return digest.digest();
        } catch (GeneralSecurityException error) {
            throw new IllegalStateException(error);
        }
    }

    static boolean same(byte[] one, byte[] other) { return MessageDigest.isEqual(one, other); }

    static boolean same(String one, String other) { return same(Bytes.utf8(one), Bytes.utf8(other)); }

    static byte[] encrypt(byte[] key, byte[] nonce, byte[] plain, byte[] associated) {
        try {
            return aesGcm(Cipher.ENCRYPT_MODE, key, nonce, plain, associated);
        } catch (GeneralSecurityException error) {
            throw new IllegalStateException(error);
        }
    }

    /** Raises GeneralSecurityException if it was not made with these. */
    static byte[] decrypt(byte[] key, byte[] nonce, byte[] sealed, byte[] associated) throws GeneralSecurityException {
        return aesGcm(Cipher.DECRYPT_MODE, key, nonce, sealed, associated);
    }

    private static byte[] aesGcm(int mode, byte[] key, byte[] nonce, byte[] input, byte[] associated)
            throws GeneralSecurityException {
        Cipher cipher = Cipher.getInstance("AES/GCM/NoPadding");
        cipher.init(mode, new SecretKeySpec(key, "AES"), new GCMParameterSpec(8 * TAG_SIZE, nonce));
        cipher.updateAAD(associated);
        return cipher.doFinal(input);
    }

    /** Whether the holder of the raw Ed25519 key signed this. */
    static boolean isSigned(byte[] key, byte[] signed, byte[] signature) {
        try {
            Ed25519Signer verifier = new Ed25519Signer();
            verifier.init(false, new Ed25519PublicKeyParameters(key, 0));
            verifier.update(signed, 0, signed.length);
            return signature.length == 64 && verifier.verifySignature(signature);
        } catch (IllegalArgumentException error) {
            return false; // the key is no point of the curve
        }
    }
}
