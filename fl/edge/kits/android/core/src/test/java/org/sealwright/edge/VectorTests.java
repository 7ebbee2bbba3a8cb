package org.sealwright.edge;

import java.io.IOException;
import java.math.BigInteger;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.Paths;
import java.security.AlgorithmParameters;
import java.security.GeneralSecurityException;
import java.security.KeyFactory;
import java.security.SecureRandom;
import java.security.spec.ECGenParameterSpec;
import java.security.spec.ECParameterSpec;
import java.security.spec.ECPrivateKeySpec;
import java.time.Instant;
import java.util.Arrays;
import java.util.Collections;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/** The core against the protocol's vectors: {@code VectorTests FOLDER OUT}. What the reference is to open goes to OUT. */
public final class VectorTests {
    private static final int LIMIT = 64 << 20;
    private final Path folder;
    private int checks;
    private int failures;

    private VectorTests(Path folder) { this.folder = folder; }

    public static void main(String[] arguments) throws IOException, GeneralSecurityException {
        VectorTests tests = new VectorTests(Paths.get(arguments[0]));
        tests.protocol();
        tests.json();
        tests.messages();
        Map<String, Object> made = tests.sealing();
        tests.safetensors();
        made.put("deltas", tests.deltas());
        tests.trust();
        Files.write(Paths.get(arguments[1]), CanonicalJson.write(made));
        System.out.println(tests.checks + " checks, " + tests.failures + " failed");
        if (tests.failures > 0) System.exit(1);
    }

    /** A device's key from its secret number. */
    static DeviceKey key(String scalar) throws GeneralSecurityException {
        AlgorithmParameters curve = AlgorithmParameters.getInstance("EC");
        curve.init(new ECGenParameterSpec("secp256r1"));
        ECParameterSpec parameters = curve.getParameterSpec(ECParameterSpec.class);
        ECPrivateKeySpec secret = new ECPrivateKeySpec(new BigInteger(scalar, 16), parameters);
        return new DeviceKey(KeyFactory.getInstance("EC").generatePrivate(secret));
    }

    private void protocol() {
        Fields all = vectors("protocol");
        for (Protocol.State state : Protocol.State.values()) {
            Object sends = state.sends == null ? null : state.sends.word();
            check(all.list("states", 9).contains(state.word()), state + " is a state");
            check(java.util.Objects.equals(all.object("sends").get(state.word()), sends), state + " sends");
        }
        equal(all.text("trained", Fields.ANY), Protocol.TRAINED.word(), "trained");
        equal(all.text("gave_up", Fields.ANY), Protocol.GAVE_UP.word(), "gave up");
        for (Fields rule : all.objects("table", 99)) {
            Protocol.Rule found = next(rule.text("message", Fields.ANY), rule.text("status", Fields.ANY));
            equal(rule.text("then", Fields.ANY), found.then.word(), "then");
            equal(rule.any("waits"), found.waits, "waits");
        }
        Fields next = all.fields("next");
        for (Protocol.Message message : Protocol.Message.values()) {
            for (Protocol.Status status : Protocol.Status.values()) {
                Object wanted = next.object(message.word()).get(status.name());
                equal(wanted, Protocol.next(message, status).then.word(), message + " " + status);
            }
        }
    }

    private static Protocol.Rule next(String message, String status) {
        return Protocol.next(message(message), Protocol.Status.valueOf(status));
    }

    private static Protocol.Message message(String word) {
        return Protocol.Message.valueOf(word.toUpperCase(java.util.Locale.ROOT));
    }

    private void json() {
        Fields all = vectors("json");
        for (Fields one : all.objects("texts", 999)) {
            byte[] raw = raw(one, "raw");
            equal(one.any("good"), holds(() -> Json.readCanonical(raw, Answer.MAX_WORDS)), new String(raw));
        }
        for (Fields one : all.objects("numbers", 999)) {
            double number = Double.longBitsToDouble(Long.parseUnsignedLong(one.text("bits", Fields.ANY), 16));
            equal(one.text("text", Fields.ANY), CanonicalJson.number(number), "number");
        }
    }

    private void messages() {
        Fields all = vectors("messages");
        Fields requests = all.fields("requests");
        equal(requests.text("job", Fields.ANY), text(request(all).job(
                Arrays.asList("heart-*", "sleep"), new LinkedHashMap<>(pair("os", "linux", "cpu", "8")))), "job");
        equal(requests.text("task", Fields.ANY), text(request(all).task("job-1", 2.5)), "task");
        equal(requests.text("selection", Fields.ANY), text(request(all).selection("job-1", 7)), "selection");
        Task task = null;
        for (Fields one : all.objects("answers", 999)) {
            Protocol.Message message = message(one.text("message", Fields.ANY));
            byte[] raw = Bytes.utf8(one.text("text", Fields.ANY));
            equal(one.any("good"), holds(() -> Answer.read(message, raw)), one.text("text", Fields.ANY));
            if (task == null && message == Protocol.Message.TASK) task = Answer.read(message, raw).task;
        }
        equal(requests.text("result", Fields.ANY), text(request(all).result(
                "job-1", task.version, task.digest, 8.0, Deltas.Encoding.BF16, true, task.cookie)), "result");
        equal(CanonicalJson.number(7), CanonicalJson.number(task.version), "the task's version");
        byte[] words = CanonicalJson.write(task.words());
        byte[] again = CanonicalJson.write(new Task(new Fields(Json.read(words, LIMIT), "task")).words());
        check(Arrays.equals(words, again), "a task is kept as it was read");
    }

    private static Map<String, String> pair(String... words) {
        Map<String, String> found = new LinkedHashMap<>();
        for (int at = 0; at < words.length; at += 2) found.put(words[at], words[at + 1]);
        return found;
    }

    private static Request request(Fields all) {
        Fields common = all.fields("common");
        return new Request(common.text("token", Fields.ANY), common.text("request", Fields.ANY),
                common.text("answer_key", Fields.ANY));
    }

    private static String text(Request request) {
        return new String(request.toBytes(), java.nio.charset.StandardCharsets.UTF_8);
    }

    private Map<String, Object> sealing() throws GeneralSecurityException {
        Fields all = vectors("sealing");
        byte[] group = raw(all, "group_key");
        equal(all.text("key_id", Fields.ANY), Bytes.hex(Sealing.keyId(group)), "key id");
        for (Fields one : all.objects("answers", 99)) {
            byte[] body = raw(one, "body");
            byte[] key = raw(one, "answer_key");
            opens(one.any("words"), () -> Sealing.openAnswer(body, key, one.text("request", Fields.ANY)));
        }
        for (Fields one : all.objects("blobs", 99)) {
            byte[] sealed = raw(one, "sealed");
            opens(one.any("content"), () -> Sealing.openBlob(new Blob(one.fields("blob")), sealed));
        }
        Fields request = all.fields("request");
        Protocol.Message message = message(request.text("message", Fields.ANY));
        byte[] body = Sealing.sealRequest(message, raw(request, "words"), raw(request, "tensors"),
                key(all.text("device_key", Fields.ANY)), group, all.text("charter", Fields.ANY), new SecureRandom());
        check(!holds(() -> Hybrid.seal(body, new byte[Hybrid.PUBLIC_SIZE - 1], body, new SecureRandom())), "short key");
        Map<String, Object> made = new LinkedHashMap<>();
        made.put("request", Bytes.hex(body));
        return made;
    }

    private void safetensors() {
        for (Fields one : vectors("safetensors").objects("files", 999)) {
            byte[] raw = raw(one, "raw");
            if (!one.has("floats")) {
                check(!holds(() -> Safetensors.floats(raw)), "a file that is none: " + new String(raw));
                continue;
            }
            Map<String, Tensor> found = Safetensors.floats(raw);
            Fields floats = one.fields("floats");
            equal(floats.values().keySet(), found.keySet(), "tensors");
            for (String name : found.keySet()) {
                Fields wanted = floats.fields(name);
                equal(wanted.text("values", Fields.ANY), Bytes.hex(littleEndian(found.get(name).values)), name);
                equal(wanted.list("shape", 16).toString(), Arrays.toString(found.get(name).shape), name);
            }
        }
    }

    private Map<String, Object> deltas() {
        Fields all = vectors("deltas");
        Map<String, Tensor> tensors = new LinkedHashMap<>();
        for (Fields one : all.objects("tensors", 99)) {
            long[] shape = one.list("shape", 9).stream().mapToLong(size -> (Long) size).toArray();
            tensors.put(one.text("name", Fields.ANY), new Tensor(shape, numbers(raw(one, "values"))));
        }
        float[] draws = numbers(raw(all, "draws"));
        Map<String, Object> compressed = new LinkedHashMap<>();
        for (Deltas.Encoding encoding : Deltas.Encoding.values()) {
            String wanted = all.fields("encoded").text(encoding.word, Fields.ANY);
            equal(wanted, Bytes.hex(Deltas.encode(tensors, encoding, drawing(draws), false)), encoding.word);
            compressed.put(encoding.word, Bytes.hex(Deltas.encode(tensors, encoding, drawing(draws), true)));
        }
        Map<String, Tensor> bad = Collections.singletonMap("a", new Tensor(new long[] {1}, new float[] {Float.NaN}));
        check(!holds(() -> Deltas.encode(bad, Deltas.Encoding.F32, drawing(draws), false)), "not finite");
        return compressed;
    }

    private static Deltas.Draws drawing(float[] numbers) {
        int[] at = {0};
        return () -> numbers[at[0]++];
    }

    private void trust() {
        Fields all = vectors("trust");
        for (Fields one : all.objects("charters", 999)) {
            Trust trust = new Trust(root(all, one), (Boolean) one.any("production"));
            Instant at = Times.read(one.text("at", Fields.ANY));
            if (one.has("known")) trust.follow(store(all, one.text("known", Fields.ANY), new HashMap<>()), at);
            byte[] answer = store(all, one.text("store", Fields.ANY), one.object("changed"));
            equal(one.any("good"), holds(() -> trust.follow(answer, at)), one.values().toString());
            if (one.has("version")) equal(one.any("version"), trust.version(), "the charter's version");
        }
        Trust trust = new Trust(Bytes.utf8(all.fields("roots").text("hardware", Fields.ANY)), true);
        check(!holds(() -> trust.appraise(new byte[0], "", Instant.EPOCH)), "no charter yet");
        trust.follow(store(all, "hardware-3", new HashMap<>()), at(all.objects("proofs", 999).get(0)));
        for (Fields one : all.objects("proofs", 999)) {
            byte[] proof = Bytes.utf8(one.text("proof", Fields.ANY));
            String said = said(() -> equal(one.any("until"), trust.appraise(
                    proof, one.text("nonce", Fields.ANY), at(one)).until.toString(), "until"));
            equal(one.text("says", Fields.ANY), said, one.text("name", Fields.ANY));
        }
        for (Fields one : all.objects("tasks", 999)) {
            Task task = new Task(one.fields("task"));
            equal(one.text("says", Fields.ANY), said(() -> trust.admit(task, at(one))), "task");
        }
    }

    private static Instant at(Fields one) { return Times.read(one.text("at", Fields.ANY)); }

    private static byte[] root(Fields all, Fields one) {
        return Bytes.utf8(all.fields("roots").text(one.text("root", Fields.ANY), Fields.ANY));
    }

    private static byte[] store(Fields all, String name, Map<String, Object> changed) {
        Map<String, Object> files = new LinkedHashMap<>(all.fields("stores").object(name));
        files.putAll(changed);
        files.values().removeIf(java.util.Objects::isNull);
        return CanonicalJson.write(Collections.singletonMap("files", files));
    }

    // --- what all of them use ---------------------------------------------------------------------------------------

    private Fields vectors(String name) {
        try {
            return new Fields(Json.read(Files.readAllBytes(folder.resolve(name + ".json")), LIMIT), name);
        } catch (IOException error) {
            throw new IllegalStateException(error);
        }
    }

    private static byte[] raw(Fields fields, String name) { return Bytes.unhex(fields.text(name, Fields.ANY)); }

    private static float[] numbers(byte[] raw) {
        float[] found = new float[raw.length / 4];
        ByteBuffer.wrap(raw).order(ByteOrder.LITTLE_ENDIAN).asFloatBuffer().get(found);
        return found;
    }

    private static byte[] littleEndian(float[] values) {
        ByteBuffer bytes = ByteBuffer.allocate(4 * values.length).order(ByteOrder.LITTLE_ENDIAN);
        for (float value : values) bytes.putFloat(value);
        return bytes.array();
    }

    private interface Opening {
        byte[] open();
    }

    private void opens(Object wanted, Opening opening) {
        if (wanted == null) check(!holds(opening::open), "it opens what it should not");
        else equal(wanted, Bytes.hex(opening.open()), "it opens");
    }

    private static boolean holds(Runnable work) { return said(work).isEmpty(); }

    /** The first reason for which it is refused; "" if it is not. */
    private static String said(Runnable work) {
        try {
            work.run();
            return "";
        } catch (Refused error) {
            return error.reasons().get(0);
        }
    }

    private void equal(Object wanted, Object found, String what) {
        check(wanted.equals(found), what + ": wanted " + wanted + ", found " + found);
    }

    private void check(boolean good, String what) {
        checks++;
        if (good) return;
        failures++;
        System.err.println("FAILED: " + what);
    }
}
