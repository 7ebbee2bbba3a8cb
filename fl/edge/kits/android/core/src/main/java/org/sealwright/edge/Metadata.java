package org.sealwright.edge;

import java.time.Instant;
import java.util.HashSet;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.Set;
import java.util.regex.Pattern;

/** One file of TUF metadata, and the signatures over it. */
final class Metadata {
    private static final Pattern SIGNATURE = Pattern.compile("[0-9a-f]{128}");
    private static final Pattern VERSION = Pattern.compile("1\\.[0-9.]{1,16}");
    private static final int MAX_SIGNATURES = 128;

    final Fields signed;
    final long version;
    final Instant expires;
    /** SHA-256 (hex) of the signed part. */
    final String digest;
    private final byte[] signedBytes;
    private final Map<String, byte[]> signatures = new LinkedHashMap<>();
    private final String name;

    Metadata(String name, byte[] raw, String type) {
        this.name = name;
        if (raw == null) throw new Refused(name + ": missing");
        Fields all = new Fields(Json.read(raw, Charter.MAX_FILE), name);
        for (Fields one : all.objects("signatures", MAX_SIGNATURES)) {
            byte[] signature = Bytes.unhex(one.text("sig", SIGNATURE));
            if (signatures.put(one.text("keyid", Fields.HEX32), signature) != null) {
                throw new Refused(name + ": a key signs twice");
            }
            one.end();
        }
        signed = all.fields("signed");
        all.end();
        signedBytes = CanonicalJson.writeForTuf(signed.values());
        digest = Bytes.hex(Crypto.sha256(signedBytes));
        if (!type.equals(signed.text("_type", Fields.ANY))) throw new Refused(name + ": is of another type");
        signed.text("spec_version", VERSION);
        version = signed.integer("version", 1, Integer.MAX_VALUE);
        expires = Times.read(signed.text("expires", Fields.ANY));
    }

    /** Which of these keys (raw, by id) have signed. */
    private Set<String> signers(Map<String, byte[]> keys) {
        Set<String> found = new HashSet<>();
        for (Map.Entry<String, byte[]> one : signatures.entrySet()) {
            byte[] key = keys.get(one.getKey());
            if (key != null && Crypto.isSigned(key, signedBytes, one.getValue())) found.add(one.getKey());
        }
        return found;
    }

    /** Check that at least {@code threshold} of these keys have signed. Raises Refused. */
    void mustBeSigned(Map<String, byte[]> keys, long threshold) {
        int count = signers(keys).size();
        if (count < threshold) throw new Refused(name + ": needs " + threshold + " signatures, has " + count);
    }

    /** Check that every signature is by one of these keys, and good. Raises Refused. */
    void mustHaveNoOthers(Map<String, byte[]> keys) {
        if (!signers(keys).equals(signatures.keySet())) throw new Refused(name + ": a signature is not valid");
    }

    void mustHold(Instant at) {
        if (!at.isBefore(expires)) throw new Refused(name + ": expired on " + expires);
    }

    void mustBeVersion(long wanted) {
        if (version != wanted) throw new Refused(name + ": says it is version " + version);
    }
}
