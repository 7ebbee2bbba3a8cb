package org.sealwright.edge.android;

import android.security.keystore.KeyGenParameterSpec;
import android.security.keystore.KeyProperties;
import java.io.IOException;
import java.security.GeneralSecurityException;
import java.security.KeyPairGenerator;
import java.security.KeyStore;
import java.security.PrivateKey;
import java.security.PublicKey;
import java.security.spec.ECGenParameterSpec;
import org.sealwright.edge.DeviceKey;

/** The device's P-256 key in the Android Keystore: made there, and never out of it. */
public final class KeystoreKey {
    private static final String STORE = "AndroidKeyStore";
    private static final String ALIAS = "sealwright-edge-device";

    private KeystoreKey() {}

    /** The key, made at the first call. */
    public static DeviceKey get() throws GeneralSecurityException, IOException {
        return new DeviceKey((PrivateKey) store().getKey(ALIAS, null));
    }

    /** What the consortium's issuer puts into the device's token: SubjectPublicKeyInfo in DER. */
    public static byte[] publicKey() throws GeneralSecurityException, IOException {
        PublicKey key = store().getCertificate(ALIAS).getPublicKey();
        return key.getEncoded();
    }

    private static KeyStore store() throws GeneralSecurityException, IOException {
        KeyStore store = KeyStore.getInstance(STORE);
        store.load(null);
        if (!store.containsAlias(ALIAS)) {
            KeyPairGenerator maker = KeyPairGenerator.getInstance(KeyProperties.KEY_ALGORITHM_EC, STORE);
            maker.initialize(new KeyGenParameterSpec.Builder(ALIAS, KeyProperties.PURPOSE_SIGN)
                    .setAlgorithmParameterSpec(new ECGenParameterSpec("secp256r1"))
                    .setDigests(KeyProperties.DIGEST_SHA256)
                    .build());
            maker.generateKeyPair();
        }
        return store;
    }
}
