package org.sealwright.edge;

import java.util.Collections;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.Map;

/**
 * Who belongs to a charter: the field {@code sealwright} of its root. Which keys sign which role follows from it alone,
 * so that the metadata's own lists of keys, roles and delegations are never asked.
 */
final class Consortium {
    private static final int KEY_PREFIX_SIZE = 12;
    private static final byte[] KEY_PREFIX = Bytes.unhex("302a300506032b6570032100");

    final String platform;
    final String trustDomain;
    final long brokerThreshold;
    final long leaseSeconds;
    /** Brokers' raw Ed25519 keys, by name. */
    final Map<String, byte[]> brokers = new LinkedHashMap<>();
    /** Raw Ed25519 keys by TUF key id. */
    final Map<String, byte[]> memberKeys = new LinkedHashMap<>();
    final Map<String, byte[]> brokerKeys = new LinkedHashMap<>();
    private final long threshold;
    private final Map<String, Long> thresholds = new HashMap<>();

    Consortium(Fields fields) {
        platform = fields.text("platform", Fields.NAME);
        trustDomain = fields.text("trust_domain", Fields.WORD);
        for (Fields member : fields.objects("members", 64)) {
            byte[] key = rawKey(member.text("public_key", Fields.ANY));
            memberKeys.put(keyId(key), key);
        }
        for (Fields broker : fields.objects("brokers", 16)) {
            byte[] key = rawKey(broker.text("signing_key", Fields.ANY));
            brokerKeys.put(keyId(key), key);
            brokers.put(broker.text("name", Fields.NAME), key);
        }
        boolean distinct = Collections.disjoint(memberKeys.keySet(), brokerKeys.keySet());
        int members = fields.list("members", 64).size();
        if (!distinct || memberKeys.size() != members || brokers.size() != fields.list("brokers", 16).size()
                || brokerKeys.size() != brokers.size() || members == 0 || brokers.isEmpty()) {
            throw new Refused("the consortium gives one key to two parties, or has none");
        }
        threshold = fields.integer("threshold", 1, members);
        Map<String, Object> own = fields.isGiven("thresholds") ? fields.object("thresholds") : new HashMap<>();
        Fields each = new Fields(own, "thresholds");
        for (String role : own.keySet()) thresholds.put(role, each.integer(role, 1, members));
        brokerThreshold = fields.isGiven("broker_threshold") ? fields.integer("broker_threshold", 1, brokers.size()) : 1;
        leaseSeconds = fields.isGiven("lease_seconds") ? fields.integer("lease_seconds", 5, 3600) : 60;
        boolean virtual = platform.equals("virtual");
        if (!virtual && !platform.equals("hardware") || trustDomain.startsWith("virtual.") != virtual) {
            throw new Refused("the consortium's platform and trust domain do not fit");
        }
    }

    /** How many members sign this role. */
    long thresholdFor(String role) { return thresholds.getOrDefault(role, threshold); }

    /** The raw key in the PEM of an Ed25519 key. */
    private static byte[] rawKey(String pem) {
        String begin = "-----BEGIN PUBLIC KEY-----\n";
        String end = "\n-----END PUBLIC KEY-----\n";
        if (!pem.startsWith(begin) || !pem.endsWith(end) || pem.length() < begin.length() + end.length()) {
            throw new Refused("a key is not in PEM");
        }
        return rawKey(Bytes.unb64(pem.substring(begin.length(), pem.length() - end.length())));
    }

    /** The raw key in the DER (SubjectPublicKeyInfo) of an Ed25519 key. */
    static byte[] rawKey(byte[] der) {
        if (der.length != KEY_PREFIX_SIZE + 32 || !Crypto.same(Bytes.cut(der, 0, KEY_PREFIX_SIZE), KEY_PREFIX)) {
            throw new Refused("a key is not Ed25519");
        }
        return Bytes.cut(der, KEY_PREFIX_SIZE, der.length);
    }

    private static String keyId(byte[] key) {
        Map<String, Object> said = new LinkedHashMap<>();
        said.put("keytype", "ed25519");
        said.put("keyval", Collections.singletonMap("public", Bytes.hex(key)));
        said.put("scheme", "ed25519");
        return Bytes.hex(Crypto.sha256(CanonicalJson.writeForTuf(said)));
    }
}
