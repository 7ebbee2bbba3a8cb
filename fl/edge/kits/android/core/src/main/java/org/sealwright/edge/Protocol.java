package org.sealwright.edge;

import java.util.EnumMap;
import java.util.Locale;
import java.util.Map;

/** The device protocol's state table; tests hold it against the reference's (docs/reference/device-protocol.md). */
public final class Protocol {
    public enum Message {
        JOB, TASK, SELECTION, RESULT, MASK;

        public String word() { return name().toLowerCase(Locale.ROOT); }
    }

    public enum Status { OK, RETRY, NO_TASK, NO_JOB, DONE, ERROR, INVALID_REQUEST }

    /** Where a device is. */
    public enum State {
        IDLE(Message.JOB), JOINED(Message.TASK), TRAINING(Message.SELECTION), REPORTING(Message.RESULT),
        /** Of the table alone: this kit refuses tasks whose results are masked, so that no device of it gets here. */
        MASKING(Message.MASK), OVER(null);

        /** What a device sends in this state; null: nothing. */
        public final Message sends;

        State(Message sends) { this.sends = sends; }

        public String word() { return name().toLowerCase(Locale.ROOT); }
    }

    /** An answer leads to {@code then}; {@code waits}: the device waits as long as the answer says. */
    public static final class Rule {
        public final Message message;
        public final State then;
        public final boolean waits;

        Rule(Message message, State then, boolean waits) {
            this.message = message;
            this.then = then;
            this.waits = waits;
        }
    }

    /** Where a device goes from TRAINING when its task has a result, */
    public static final State TRAINED = State.REPORTING;
    /** and where when it has none. */
    public static final State GAVE_UP = State.JOINED;

    private static final Map<Message, Map<Status, Rule>> RULES = new EnumMap<>(Message.class);

    static {
        rule(Message.JOB, Status.OK, State.JOINED, false);
        rule(Message.JOB, Status.RETRY, State.IDLE, true);
        rule(Message.JOB, Status.NO_JOB, State.IDLE, true);
        rule(Message.JOB, Status.DONE, State.OVER, false);
        rule(Message.JOB, Status.ERROR, State.IDLE, true);
        rule(Message.JOB, Status.INVALID_REQUEST, State.OVER, false);
        rule(Message.TASK, Status.OK, State.TRAINING, false);
        rule(Message.TASK, Status.RETRY, State.JOINED, true);
        rule(Message.TASK, Status.NO_TASK, State.JOINED, true);
        rule(Message.TASK, Status.NO_JOB, State.IDLE, true);
        rule(Message.TASK, Status.DONE, State.IDLE, true);
        rule(Message.TASK, Status.ERROR, State.JOINED, true);
        rule(Message.TASK, Status.INVALID_REQUEST, State.OVER, false);
        rule(Message.SELECTION, Status.OK, State.TRAINING, false);
        rule(Message.SELECTION, Status.NO_TASK, State.JOINED, false);
        rule(Message.SELECTION, Status.NO_JOB, State.IDLE, true);
        rule(Message.SELECTION, Status.DONE, State.IDLE, true);
        rule(Message.SELECTION, Status.ERROR, State.TRAINING, true);
        rule(Message.SELECTION, Status.INVALID_REQUEST, State.JOINED, false);
        rule(Message.RESULT, Status.OK, State.JOINED, false);
        rule(Message.RESULT, Status.RETRY, State.REPORTING, true);
        rule(Message.RESULT, Status.NO_TASK, State.JOINED, false);
        rule(Message.RESULT, Status.NO_JOB, State.IDLE, true);
        rule(Message.RESULT, Status.DONE, State.IDLE, true);
        rule(Message.RESULT, Status.ERROR, State.REPORTING, true);
        rule(Message.RESULT, Status.INVALID_REQUEST, State.JOINED, true);
        rule(Message.MASK, Status.OK, State.MASKING, false);
        rule(Message.MASK, Status.RETRY, State.MASKING, true);
        rule(Message.MASK, Status.NO_TASK, State.JOINED, false);
        rule(Message.MASK, Status.NO_JOB, State.IDLE, true);
        rule(Message.MASK, Status.DONE, State.IDLE, true);
        rule(Message.MASK, Status.ERROR, State.MASKING, true);
        rule(Message.MASK, Status.INVALID_REQUEST, State.JOINED, true);
    }

    private Protocol() {}

    /** The rule of an answer; a status that may not answer {@code message} counts as ERROR. */
    public static Rule next(Message message, Status status) {
        Map<Status, Rule> rules = RULES.get(message);
        Rule found = rules.get(status);
        return found != null ? found : rules.get(Status.ERROR);
    }

    private static void rule(Message message, Status status, State then, boolean waits) {
        RULES.computeIfAbsent(message, unused -> new EnumMap<>(Status.class))
                .put(status, new Rule(message, then, waits));
    }
}
