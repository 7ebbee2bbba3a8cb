package org.sealwright.edge;

import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Map;
import java.util.regex.Pattern;

/** What a gateway answers. What belongs to another message's answer is null or empty. */
public final class Answer {
    /** Bytes of any message's words. */
    public static final int MAX_WORDS = 256 << 10;
    private static final double MAX_RETRY_SECONDS = 86400;
    private static final Pattern STATUS =
            Pattern.compile("OK|RETRY|NO_TASK|NO_JOB|DONE|ERROR|INVALID_REQUEST");
    private static final Pattern TEXT = Pattern.compile(".{0,500}", Pattern.DOTALL);

    public final Protocol.Status status;
    public final String message;
    public final double retrySeconds;
    public String job;
    public String name;
    public String method;
    public Map<String, Object> config = Collections.emptyMap();
    public Task task;
    public final List<Long> versions = new ArrayList<>();

    private Answer(Fields fields) {
        status = Protocol.Status.valueOf(fields.text("status", STATUS));
        message = fields.isGiven("message") ? fields.text("message", TEXT) : "";
        retrySeconds = fields.isGiven("retry_seconds") ? fields.number("retry_seconds", 0, MAX_RETRY_SECONDS) : 0;
    }

    /** The words of an answer to {@code message}. Raises Refused for anything but their canonical form. */
    public static Answer read(Protocol.Message message, byte[] raw) {
        Fields fields = new Fields(Json.readCanonical(raw, MAX_WORDS), message.word());
        Answer answer = new Answer(fields);
        if (message == Protocol.Message.JOB) {
            answer.job = fields.textOrNull("job", Fields.JOB);
            answer.name = fields.textOrNull("name", Fields.WORD);
            answer.method = fields.textOrNull("method", Fields.WORD);
            if (fields.isGiven("config")) answer.config = fields.object("config");
        } else if (message == Protocol.Message.TASK) {
            if (fields.has("task")) answer.task = new Task(fields.fields("task"));
        } else if (message == Protocol.Message.SELECTION && fields.isGiven("versions")) {
            for (Object version : fields.list("versions", 64)) {
                if (!(version instanceof Long) || (Long) version < 0 || (Long) version >= 1L << 31) {
                    throw new Refused("a version is none");
                }
                answer.versions.add((Long) version);
            }
        }
        fields.end();
        return answer;
    }
}
