package org.sealwright.edge;

import java.time.Instant;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.regex.Pattern;

/** What a device believes: the charter that verifies itself from a pinned root, and the gateway that it admits. */
public final class Trust {
    private static final int MAX_CHARTER = 32 << 20;
    private static final int MAX_INTRODUCTION = 128 << 10;
    private static final int MAX_EARS = 16;
    private static final String PROOF_TYPE = "sealwright-gateway-proof+jwt";
    private static final Pattern WORD = Pattern.compile(".{0,16384}", Pattern.DOTALL);
    private static final Pattern KEY = Pattern.compile(".{0,128}", Pattern.DOTALL);

    /** The charter's id: the SHA-256 of its first root. */
    public final String id;
    private final byte[] root;
    private final boolean production;
    private Charter charter;

    /** {@code root}: the charter's first root, all that an app carries; in {@code production} a virtual one is refused. */
    public Trust(byte[] root, boolean production) {
        this.root = root.clone();
        this.production = production;
        id = Bytes.hex(Crypto.sha256(root));
    }

    /** The newest version of the charter that the device has seen; null: none yet. */
    public Long version() { return charter == null ? null : charter.version; }

    private Charter charter(Instant at) {
        if (charter == null || !at.isBefore(charter.expires)) {
            throw new Refused("the device has no charter that holds now");
        }
        return charter;
    }

    /** Take the charter in the answer to {@code GET charter}, never an older one than before. Raises Refused. */
    public void follow(byte[] raw, Instant at) {
        Charter found = new Charter(store(raw), root, at, charter);
        if (production && found.consortium.platform.equals("virtual")) {
            throw new Refused("the charter is for the virtual platform, which keeps nothing from its host");
        }
        charter = found;
    }

    private static Map<String, byte[]> store(byte[] raw) {
        Map<String, byte[]> store = new HashMap<>();
        Fields files = new Fields(Json.read(raw, MAX_CHARTER), "charter").fields("files");
        for (String name : files.values().keySet()) store.put(name, Bytes.unb64(files.text(name, Fields.ANY)));
        return store;
    }

    /** The gateway that answered {@code POST proof} over our nonce. Raises Refused with every reason. */
    public GatewayProof appraise(byte[] raw, String nonce, Instant at) {
        Charter known = charter(at);
        String token;
        List<String> tokens;
        byte[] der;
        byte[] key;
        try {
            Fields said = new Fields(Json.read(raw, MAX_INTRODUCTION), "introduction");
            token = said.text("word", WORD);
            der = Bytes.unb64(said.text("sign_key", KEY));
            tokens = said.texts("ears", WORD, MAX_EARS);
            said.end();
            key = Consortium.rawKey(der);
            if (tokens.isEmpty()) throw new Refused("no EARs");
        } catch (Refused error) {
            throw new Refused("its introduction is malformed");
        }
        List<Ear> ears = Ears.verify(tokens, known, at);
        Ear ear = ears.get(0);
        List<String> reasons = new ArrayList<>(Ears.placeReasons(ear, known));
        if (!ear.role.equals("gateway")) reasons.add("its EARs are those of " + ear.place());
        if (!Crypto.same(String.valueOf(ear.keys.get("sign")), Bytes.hex(Crypto.sha256(der)))) {
            reasons.add("its key is not the one that its EARs name");
        }
        if (!reasons.isEmpty()) throw new Refused(reasons);
        return proof(ears, word(token, key), nonce);
    }

    private static Map<String, Object> word(String token, byte[] key) {
        try {
            return Jws.read(token, key, PROOF_TYPE);
        } catch (Refused error) {
            throw new Refused("its word is not its own: " + error.getMessage());
        }
    }

    private GatewayProof proof(List<Ear> ears, Map<String, Object> word, String nonce) {
        List<String> reasons = new ArrayList<>();
        if (!nonce.equals(word.get("nonce"))) reasons.add("its word is over another nonce");
        Object about = word.get("charter");
        if (!(about instanceof Map) || !id.equals(((Map<?, ?>) about).get("id"))) {
            reasons.add("its word is about another charter");
        }
        Instant until = ears.get(0).expires();
        for (Ear ear : ears) {
            if (ear.expires().isBefore(until)) until = ear.expires();
            if (production && ear.platform.equals("virtual")) reasons.add("it runs on the virtual platform");
        }
        byte[] groupKey = new byte[0];
        try {
            groupKey = Bytes.unb64(String.valueOf(word.get("group_key")));
        } catch (Refused error) {
            reasons.add("its group key is malformed");
        }
        if (groupKey.length != Hybrid.PUBLIC_SIZE
                || !Bytes.hex(Sealing.keyId(groupKey)).equals(word.get("key_id"))) {
            reasons.add("its group key is not the one that it names");
        }
        if (!reasons.isEmpty()) throw new Refused(reasons);
        return new GatewayProof(ears.get(0).name, groupKey, until);
    }

    /** Check that the charter approves this task for its job now. Raises Refused. */
    public void admit(Task task, Instant at) {
        String digest = task.ownDigest();
        Charter.Approval approval = charter(at).tasks.get(digest);
        List<String> reasons = new ArrayList<>();
        if (!digest.equals(task.digest)) reasons.add("its parts do not have the digest that it names");
        if (approval == null) reasons.add("the charter approves no device task " + digest);
        else if (!approval.job.equals(task.name)) {
            reasons.add("it is approved for the job " + approval.job + ", not " + task.name);
        } else if (!at.isBefore(approval.expires)) reasons.add("its approval has expired");
        if (task.config.keySet().stream().anyMatch(name -> name.startsWith("secure_aggregation."))) {
            reasons.add("its results are summed under masks, which this kit does not do");
        }
        if (!reasons.isEmpty()) throw new Refused(reasons);
    }
}
