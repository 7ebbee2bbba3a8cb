package org.sealwright.edge;

import java.security.SecureRandom;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/** The words of a request: the device's token, a random id, the key under which it is answered, and what is asked. */
public final class Request {
    public final String id;
    public final String answerKey;
    private final Map<String, Object> words = new LinkedHashMap<>();

    public Request(String token, String id, String answerKey) {
        this.id = id;
        this.answerKey = answerKey;
        words.put("token", token);
        words.put("request", id);
        words.put("answer_key", answerKey);
    }

    /** A request with a fresh id and key. */
    static Request fresh(String token, SecureRandom random) {
        byte[] id = new byte[16];
        byte[] key = new byte[32];
        random.nextBytes(id);
        random.nextBytes(key);
        return new Request(token, Bytes.hex(id), Bytes.hex(key));
    }

    public Request job(List<String> jobs, Map<String, String> capabilities) {
        words.put("jobs", jobs);
        words.put("capabilities", capabilities);
        return this;
    }

    public Request task(String job, double waitSeconds) {
        words.put("job", job);
        words.put("wait_seconds", waitSeconds);
        return this;
    }

    public Request selection(String job, long version) {
        words.put("job", job);
        words.put("version", version);
        return this;
    }

    public Request result(
            String job, long version, String task, double weight, Deltas.Encoding encoding, boolean compressed,
            String cookie) {
        words.put("job", job);
        words.put("version", version);
        words.put("task", task);
        words.put("weight", weight);
        words.put("encoding", encoding.word);
        words.put("compressed", compressed);
        words.put("cookie", cookie);
        return this;
    }

    public byte[] toBytes() { return CanonicalJson.write(words); }
}
