package org.sealwright.edge;

import java.util.LinkedHashMap;
import java.util.Map;
import java.util.regex.Pattern;

/** What to train, as a gateway names it. The charter approves its digest. */
public final class Task {
    private static final byte[] CONTEXT = Bytes.utf8("sealwright-device-task-v1\0");
    private static final Pattern FORMAT = Pattern.compile("executorch");

    public final long version;
    public final String name;
    public final String digest;
    public final String format;
    public final Map<String, Object> config;
    public final Blob graph;
    public final Blob model;
    final String cookie;
    final String ticket;

    public Task(Fields fields) {
        version = fields.integer("version", 0, (1L << 31) - 1);
        name = fields.text("name", Fields.WORD);
        digest = fields.text("digest", Fields.HEX32);
        format = fields.text("format", FORMAT);
        config = fields.object("config");
        graph = new Blob(fields.fields("graph"));
        model = new Blob(fields.fields("model"));
        cookie = fields.text("cookie", Fields.COOKIE);
        ticket = fields.text("ticket", Fields.COOKIE);
        fields.end();
    }

    /** The digest that its parts have. */
    String ownDigest() {
        Map<String, Object> said = new LinkedHashMap<>();
        said.put("config", config);
        said.put("format", format);
        said.put("graph", graph.sha256);
        said.put("job", name);
        return Bytes.hex(Crypto.sha256(CONTEXT, CanonicalJson.write(said)));
    }

    Map<String, Object> words() {
        Map<String, Object> words = new LinkedHashMap<>();
        words.put("version", version);
        words.put("name", name);
        words.put("digest", digest);
        words.put("format", format);
        words.put("config", config);
        words.put("graph", graph.words());
        words.put("model", model.words());
        words.put("cookie", cookie);
        words.put("ticket", ticket);
        return words;
    }
}
