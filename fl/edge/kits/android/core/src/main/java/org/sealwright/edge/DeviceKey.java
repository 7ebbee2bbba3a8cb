package org.sealwright.edge;

import java.math.BigInteger;
import java.security.GeneralSecurityException;
import java.security.PrivateKey;
import java.security.Signature;
import org.bouncycastle.crypto.signers.PlainDSAEncoding;
import org.bouncycastle.crypto.signers.StandardDSAEncoding;

/** A device's P-256 key, which its token names: the Android Keystore's, that never leaves the phone, or any other. */
public final class DeviceKey {
    private static final BigInteger ORDER =
            new BigInteger("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551", 16);
    private final PrivateKey key;

    public DeviceKey(PrivateKey key) { this.key = key; }

    /** ECDSA with SHA-256: r, then s, 32 bytes each. */
    byte[] sign(byte[] message) {
        try {
            Signature signer = Signature.getInstance("SHA256withECDSA");
            signer.initSign(key);
            signer.update(message);
            BigInteger[] numbers = StandardDSAEncoding.INSTANCE.decode(ORDER, signer.sign());
            return PlainDSAEncoding.INSTANCE.encode(ORDER, numbers[0], numbers[1]);
        } catch (GeneralSecurityException | java.io.IOException error) {
            throw new Refused("the device's key cannot sign: " + error.getClass().getSimpleName());
        }
    }
}
