package org.sealwright.edge;

import java.util.LinkedHashMap;
import java.util.Map;

/** Something to fetch: {@code sha256} and {@code size} are of its content, which {@code key} opens. */
public final class Blob {
    public final String id;
    final String key;
    public final String sha256;
    public final long size;

    public Blob(Fields fields) {
        id = fields.text("id", Fields.HEX32);
        key = fields.text("key", Fields.HEX32);
        sha256 = fields.text("sha256", Fields.HEX32);
        size = fields.integer("size", 1, (1L << 40) - 1);
        fields.end();
    }

    Map<String, Object> words() {
        Map<String, Object> words = new LinkedHashMap<>();
        words.put("id", id);
        words.put("key", key);
        words.put("sha256", sha256);
        words.put("size", size);
        return words;
    }
}
