package org.sealwright.edge;

import java.time.Instant;
import java.util.HashMap;
import java.util.Map;
import java.util.Set;
import java.util.HashSet;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * What a charter says that a device needs, verified from its first root at one moment: TUF's client workflow over the
 * roots, timestamp, snapshot, targets, and the roles of images, enrolments and code. The other roles' files grant a
 * device nothing, and are not read.
 */
public final class Charter {
    static final int MAX_FILE = 1 << 20;
    private static final long MAX_STORE = 16L << 20;
    private static final int MAX_FILES = 8192;
    private static final int MAX_ROOTS = 1024;
    private static final String PINNED = "sealwright-signed-sha256";
    private static final String[] ROLES = {"images", "enrolments", "code"};
    private static final String NAME = "([a-z0-9][a-z0-9._-]{0,62})";
    private static final Pattern IMAGE = Pattern.compile("images/" + NAME + "\\.json");
    private static final Pattern PLACE =
            Pattern.compile("enrolments/(broker|server|site|inner|gateway)/" + NAME + "\\.json");
    private static final Pattern TASK = Pattern.compile("code/device-([0-9a-f]{64})\\.json");
    private static final Pattern ROLE = Pattern.compile("broker|server|site|inner|gateway");
    private static final Pattern MEASUREMENT = Pattern.compile("[0-9a-f]{96}");
    private static final Pattern CHIP = Pattern.compile("[0-9a-f]{16}|[0-9a-f]{128}");

    /** A guest's place. */
    static final class Enrolment {
        final String member;
        final String image;
        final String initData;
        final Set<String> chips;

        Enrolment(Fields fields, String role, String name) {
            mustSay(fields.text("role", ROLE), role);
            mustSay(fields.text("name", Fields.NAME), name);
            member = fields.text("member", Fields.NAME);
            image = fields.text("image", Fields.NAME);
            initData = fields.text("init_data_sha256", Fields.HEX32);
            chips = fields.has("chips") ? new HashSet<>(fields.texts("chips", CHIP, 4096)) : null;
        }
    }

    /** An approved image. */
    static final class Image {
        final String name;
        final Set<String> roles;

        Image(String name, Set<String> roles) {
            this.name = name;
            this.roles = roles;
        }
    }

    /** A task that devices may run. */
    static final class Approval {
        final String job;
        final Instant expires;

        Approval(Fields fields, String digest) {
            mustSay(fields.text("task", Fields.HEX32), digest);
            job = fields.text("job", Fields.JOB);
            expires = Times.read(fields.text("expires", Fields.ANY));
        }
    }

    public final String id;
    public final long version;
    public final Instant expires;
    final Consortium consortium;
    final Map<String, Enrolment> enrolments = new HashMap<>();
    final Map<String, Image> imagesByMeasurement = new HashMap<>();
    final Map<String, Approval> tasks = new HashMap<>();
    private final Map<String, Metadata> read = new HashMap<>();

    /** Verify {@code store} from the first {@code root} at {@code at}; {@code known}: one seen before, or null. Raises Refused. */
    Charter(Map<String, byte[]> store, byte[] root, Instant at, Charter known) {
        mustBeBounded(store);
        id = Bytes.hex(Crypto.sha256(root));
        consortium = roots(store, root);
        Metadata timestamp = taken("timestamp", store, "metadata/timestamp.json");
        timestamp.mustBeSigned(consortium.brokerKeys, consortium.brokerThreshold);
        timestamp.mustHaveNoOthers(consortium.brokerKeys);
        Fields meta = timestamp.signed.fields("meta").fields("snapshot.json");
        long number = meta.integer("version", 1, Integer.MAX_VALUE);
        String file = "metadata/" + number + ".snapshot.json";
        mustBe(store, file, meta);
        Metadata snapshot = byMembers("snapshot", store, file, "snapshot");
        snapshot.mustBeVersion(number);
        Fields listed = snapshot.signed.fields("meta");
        role(store, "targets", listed);
        for (String role : ROLES) files(store, role, role(store, role, listed));
        Instant first = read.get("root").expires;
        for (Metadata one : read.values()) {
            one.mustHold(at);
            if (one.expires.isBefore(first)) first = one.expires;
        }
        expires = first;
        version = snapshot.version;
        if (known != null) mustFollow(known);
    }

    /** Follow the roots from the first one; the consortium of the newest. */
    private Consortium roots(Map<String, byte[]> store, byte[] root) {
        if (!Crypto.same(root, store.getOrDefault("metadata/1.root.json", new byte[0]))) {
            throw new Refused("metadata/1.root.json: not the root that you trust");
        }
        Consortium current = null;
        for (int number = 1; number <= MAX_ROOTS; number++) {
            String name = "metadata/" + number + ".root.json";
            if (!store.containsKey(name)) break;
            Metadata metadata = taken("root", store, name);
            metadata.mustBeVersion(number);
            Consortium next = new Consortium(metadata.signed.fields("sealwright"));
            metadata.mustBeSigned(next.memberKeys, next.thresholdFor("root"));
            Map<String, byte[]> keys = new HashMap<>(next.memberKeys);
            if (current != null) {
                metadata.mustBeSigned(current.memberKeys, current.thresholdFor("root"));
                keys.putAll(current.memberKeys);
                if (!next.platform.equals(current.platform) || !next.trustDomain.equals(current.trustDomain)) {
                    throw new Refused(name + ": changes the platform or the trust domain");
                }
            }
            metadata.mustHaveNoOthers(keys);
            current = next;
        }
        return current;
    }

    /** The metadata of a role that the snapshot lists. */
    private Metadata role(Map<String, byte[]> store, String role, Fields listed) {
        Fields entry = listed.fields(role + ".json");
        long number = entry.integer("version", 1, Integer.MAX_VALUE);
        Metadata metadata = byMembers(role, store, "metadata/" + number + "." + role + ".json", "targets");
        metadata.mustBeVersion(number);
        if (!Crypto.same(entry.text(PINNED, Fields.HEX32), metadata.digest)) {
            throw new Refused(role + ": not the one that the snapshot names");
        }
        return metadata;
    }

    private Metadata byMembers(String role, Map<String, byte[]> store, String file, String type) {
        Metadata metadata = new Metadata(file, store.get(file), type);
        metadata.mustBeSigned(consortium.memberKeys, consortium.thresholdFor(role));
        metadata.mustHaveNoOthers(consortium.memberKeys);
        read.put(role, metadata);
        return metadata;
    }

    private Metadata taken(String role, Map<String, byte[]> store, String file) {
        Metadata metadata = new Metadata(file, store.get(file), role);
        read.put(role, metadata);
        return metadata;
    }

    private void files(Map<String, byte[]> store, String role, Metadata metadata) {
        Fields targets = metadata.signed.fields("targets");
        for (String path : targets.values().keySet()) {
            if (!path.startsWith(role + "/")) throw new Refused(path + ": not for the role " + role + " to decide");
            Fields target = targets.fields(path);
            int cut = path.lastIndexOf('/') + 1;
            String digest = new Fields(target.object("hashes"), path).text("sha256", Fields.HEX32);
            String file = "targets/" + path.substring(0, cut) + digest + "." + path.substring(cut);
            document(path, mustBe(store, file, target));
        }
    }

    private void document(String path, byte[] raw) {
        Matcher image = IMAGE.matcher(path);
        Matcher place = PLACE.matcher(path);
        Matcher task = TASK.matcher(path);
        if (image.matches()) image(new Fields(Json.readCanonical(raw, MAX_FILE), path), image.group(1));
        else if (place.matches()) {
            Fields fields = new Fields(Json.readCanonical(raw, MAX_FILE), path);
            enrolments.put(place.group(1) + "/" + place.group(2), new Enrolment(fields, place.group(1), place.group(2)));
        } else if (task.matches()) {
            tasks.put(task.group(1), new Approval(new Fields(Json.readCanonical(raw, MAX_FILE), path), task.group(1)));
        }
    }

    private void image(Fields fields, String name) {
        mustSay(fields.text("name", Fields.NAME), name);
        mustSay(fields.text("platform", Fields.NAME), consortium.platform);
        Image image = new Image(name, new HashSet<>(fields.texts("roles", ROLE, 5)));
        for (Fields one : fields.objects("measurements", 1024)) {
            Image before = imagesByMeasurement.put(one.text("measurement", MEASUREMENT), image);
            if (before != null && before != image) throw new Refused("two images claim the same measurement");
        }
    }

    /** No step back, no second content of one version. The timestamp's floor goes when a key did. */
    private void mustFollow(Charter known) {
        if (!known.id.equals(id)) throw new Refused("this is another charter");
        boolean sameKeys = known.consortium.memberKeys.keySet().equals(consortium.memberKeys.keySet())
                && known.consortium.brokerKeys.keySet().equals(consortium.brokerKeys.keySet());
        for (Map.Entry<String, Metadata> one : known.read.entrySet()) {
            boolean timestamp = one.getKey().equals("timestamp");
            Metadata before = one.getValue();
            Metadata now = read.get(one.getKey());
            if (timestamp && !sameKeys) continue;
            if (now.version < before.version
                    || !timestamp && now.version == before.version && !now.digest.equals(before.digest)) {
                throw new Refused(one.getKey() + ": older than what is known, or other content of the same version");
            }
        }
    }

    private static byte[] mustBe(Map<String, byte[]> store, String file, Fields named) {
        byte[] raw = store.get(file);
        if (raw == null) throw new Refused(file + ": missing");
        String digest = new Fields(named.object("hashes"), file).text("sha256", Fields.HEX32);
        if (raw.length != named.integer("length", 0, MAX_FILE) || !Crypto.same(Bytes.hex(Crypto.sha256(raw)), digest)) {
            throw new Refused(file + ": not the bytes that are listed");
        }
        return raw;
    }

    private static void mustSay(String said, String wanted) {
        if (!said.equals(wanted)) throw new Refused("a document says " + said + ", not " + wanted);
    }

    private static void mustBeBounded(Map<String, byte[]> store) {
        long size = 0;
        for (byte[] raw : store.values()) {
            if (raw.length > MAX_FILE) throw new Refused("a file of the charter is too large");
            size += raw.length;
        }
        if (store.size() > MAX_FILES || size > MAX_STORE) throw new Refused("the charter is too large");
    }
}
