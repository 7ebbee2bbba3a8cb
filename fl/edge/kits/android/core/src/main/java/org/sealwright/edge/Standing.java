package org.sealwright.edge;

import java.util.LinkedHashMap;
import java.util.Locale;
import java.util.Map;
import java.util.regex.Pattern;

/** Where a device is: job and name but in idle and over, a task in training and reporting. */
public final class Standing {
    static final Standing BEGINNING = new Standing(Protocol.State.IDLE, null, null, null, 1);
    private static final Pattern STATE = Pattern.compile("idle|joined|training|reporting|over");

    public final Protocol.State state;
    public final String job;
    public final String name;
    public final Task task;
    public final double weight;

    Standing(Protocol.State state, String job, String name, Task task, double weight) {
        this.state = state;
        this.job = job;
        this.name = name;
        this.task = task;
        this.weight = weight;
    }

    /** Raises Refused for what cannot be gone on with. */
    static Standing read(byte[] raw) {
        Fields fields = new Fields(Json.readCanonical(raw, Memory.MAX_STATE), "standing");
        Standing found = new Standing(
                Protocol.State.valueOf(fields.text("state", STATE).toUpperCase(Locale.ROOT)),
                fields.textOrNull("job", Fields.JOB),
                fields.textOrNull("name", Fields.WORD),
                fields.has("task") ? new Task(fields.fields("task")) : null,
                fields.number("weight", 1, Double.MAX_VALUE));
        fields.end();
        boolean needsJob = found.state != Protocol.State.IDLE && found.state != Protocol.State.OVER;
        if (found.state == Protocol.State.MASKING) return BEGINNING;
        boolean needsTask = found.state == Protocol.State.TRAINING || found.state == Protocol.State.REPORTING;
        if (needsJob && found.job == null || needsTask && found.task == null) throw new Refused("the standing is none");
        return found;
    }

    byte[] toBytes() {
        Map<String, Object> words = new LinkedHashMap<>();
        words.put("state", state.word());
        words.put("job", job);
        words.put("name", name);
        words.put("task", task == null ? null : task.words());
        words.put("weight", weight);
        return CanonicalJson.write(words);
    }
}
