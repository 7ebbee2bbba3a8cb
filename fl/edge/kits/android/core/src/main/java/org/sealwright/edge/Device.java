package org.sealwright.edge;

import java.nio.file.Path;
import java.security.SecureRandom;
import java.time.Clock;
import java.time.Instant;
import java.util.ArrayList;
import java.util.Collections;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Random;

/**
 * The job loop of a device: what it does next follows from the protocol's table and from nothing else. A device that is
 * killed at any moment goes on from its folder. It sends nothing before a gateway has proved itself to it, and runs
 * nothing that the charter does not approve. For one thread.
 */
public final class Device {
    static final double FIRST_PAUSE = 2;
    static final double LONGEST_PAUSE = 900;
    private static final int UPLOAD_FROM = 4 << 20;
    private static final long PROOF_MARGIN_SECONDS = 2;

    private final GatewayConnection connection;
    private final Trust trust;
    private final String token;
    private final DeviceKey key;
    private final DataSource source;
    private final ComponentResolver components;
    private final Memory memory;
    private final DeviceSettings settings;
    private final Condition condition;
    private final Event event;
    private final Clock clock;
    private final SecureRandom secrets = new SecureRandom();
    private final Random random = new Random(secrets.nextLong());
    private Standing standing;
    private GatewayProof proof;
    private int failures;

    /** {@code token} and {@code key}: what the consortium's issuer gave this device; {@code folder}: its own. */
    public Device(
            GatewayConnection connection, Trust trust, String token, DeviceKey key, DataSource source,
            ComponentResolver components, Path folder, DeviceSettings settings, Condition condition, Event event,
            Clock clock) {
        this.connection = connection;
        this.trust = trust;
        this.token = token;
        this.key = key;
        this.source = source;
        this.components = components;
        this.memory = new Memory(folder);
        this.settings = settings;
        this.condition = condition;
        this.event = event;
        this.clock = clock;
        standing = memory.standing();
    }

    public Standing standing() { return standing; }

    /** Work until the device is over; an interrupt ends it. */
    public void run() throws InterruptedException {
        while (standing.state != Protocol.State.OVER) Thread.sleep((long) (1000 * step()));
    }

    /** Do the next thing; how many seconds to wait before the one after it. */
    public double step() {
        if (standing.state == Protocol.State.OVER) return LONGEST_PAUSE;
        String why = condition.why();
        if (why != null) {
            tell("waiting", "why", why);
            return FIRST_PAUSE;
        }
        try {
            double seconds = standing.state == Protocol.State.TRAINING ? train() : say(standing.state.sends);
            if (seconds == 0) failures = 0;
            return seconds;
        } catch (KeyRotated error) {
            proof = null;
            return pause();
        } catch (GatewayUnavailable error) {
            tell("waiting", "why", error.getMessage());
            return Math.max(error.seconds, pause());
        } catch (Refused error) { // the gateway, the charter or an answer does not hold: nothing was sent, or believed
            proof = null;
            refused(error);
            return pause();
        }
    }

    // --- messages ---------------------------------------------------------------------------------------------------

    /** Send {@code message}; go where the table leads. */
    private double say(Protocol.Message message) {
        Answer answer = ask(message);
        Protocol.Rule rule = Protocol.next(message, answer.status);
        go(rule, answer);
        if (answer.status == Protocol.Status.ERROR) return Math.max(answer.retrySeconds, pause());
        failures = 0;
        return rule.waits ? Math.max(answer.retrySeconds, 0.1) : 0;
    }

    private void go(Protocol.Rule rule, Answer answer) {
        Standing now = standing;
        boolean ok = answer.status == Protocol.Status.OK;
        boolean working = rule.then == Protocol.State.TRAINING || rule.then == Protocol.State.REPORTING;
        boolean none = rule.then == Protocol.State.IDLE || rule.then == Protocol.State.OVER;
        Task task = working ? now.task : null;
        String job = none ? null : now.job;
        String name = none ? null : now.name;
        if (rule.message == Protocol.Message.TASK && ok) {
            if (answer.task == null) throw new Refused("the gateway's answer has no task");
            task = answer.task;
        }
        if (rule.message == Protocol.Message.JOB && ok) {
            if (answer.job == null || answer.name == null) throw new Refused("the gateway's answer has no job");
            job = answer.job;
            name = answer.name;
        }
        keep(new Standing(rule.then, job, name, task, now.weight));
        String heard = heard(rule, ok);
        if (heard == null) return;
        Map<String, Object> details = new LinkedHashMap<>();
        details.put("status", answer.status.name());
        details.put("message", answer.message);
        details.put("job", job == null ? now.job : job);
        if (task != null) details.put("version", task.version);
        event.heard(heard, details);
    }

    /** What an app hears of an answer; null: nothing. */
    private static String heard(Protocol.Rule rule, boolean ok) {
        switch (rule.message) {
            case JOB:
                return rule.then == Protocol.State.JOINED ? "joined" : rule.then == Protocol.State.OVER ? "over" : "waiting";
            case RESULT:
                return ok ? "reported" : rule.then == Protocol.State.REPORTING ? "waiting" : "dropped";
            case TASK:
                return rule.then == Protocol.State.TRAINING ? "task" : rule.then == Protocol.State.OVER ? "over" : null;
            default:
                return null;
        }
    }

    private void keep(Standing next) {
        memory.keep(next);
        standing = next;
    }

    private Answer ask(Protocol.Message message) {
        Request request = request(message);
        byte[] tensors = message == Protocol.Message.RESULT ? memory.result() : new byte[0];
        if (tensors == null) throw new Refused("the result is gone from the device's folder");
        byte[] groupKey = gateway().groupKey;
        byte[] sealed = Sealing.sealRequest(message, request.toBytes(), tensors, key, groupKey, trust.id, secrets);
        byte[] body = message == Protocol.Message.RESULT && sealed.length >= UPLOAD_FROM
                ? connection.upload(sealed, standing.task.ticket)
                : connection.send(message, sealed);
        return Answer.read(message, Sealing.openAnswer(body, Bytes.unhex(request.answerKey), request.id));
    }

    private Request request(Protocol.Message message) {
        Request request = Request.fresh(token, secrets);
        Task task = standing.task;
        switch (message) {
            case JOB: return request.job(settings.jobs, settings.capabilities);
            case TASK: return request.task(standing.job, settings.waitSeconds);
            case SELECTION: return request.selection(standing.job, task.version);
            default: return request.result(standing.job, task.version, task.digest, standing.weight,
                    settings.encoding, settings.compressed, task.cookie);
        }
    }

    /** A gateway that has proved itself, and whose EARs have not ended. */
    private GatewayProof gateway() {
        Instant at = clock.instant();
        if (proof == null || !at.isBefore(proof.until.minusSeconds(PROOF_MARGIN_SECONDS))) {
            proof = null;
            byte[] charter = connection.charter(trust.version());
            if (charter != null) trust.follow(charter, at);
            byte[] nonce = new byte[16];
            secrets.nextBytes(nonce);
            proof = trust.appraise(connection.proof(Bytes.hex(nonce)), Bytes.hex(nonce), clock.instant());
        }
        return proof;
    }

    /** How long to wait after a failure: twice as long after each, and never the same for all devices. */
    private double pause() {
        failures = Math.min(failures + 1, 20);
        return Math.min(FIRST_PAUSE * Math.pow(2, failures - 1), LONGEST_PAUSE) * (0.5 + random.nextDouble());
    }

    // --- training ---------------------------------------------------------------------------------------------------

    private double train() {
        Task task = standing.task;
        gateway(); // a device that was restarted has no charter yet that could approve its task
        byte[] encoded;
        int examples;
        try {
            if (!task.name.equals(standing.name)) throw new Refused("the task is for another job");
            trust.admit(task, clock.instant());
            Trainer trainer = components.trainerOf(task);
            List<Filter> filtersIn = new ArrayList<>(settings.filtersIn);
            filtersIn.addAll(components.filtersOf(task, "filters_in"));
            List<Filter> filtersOut = components.filtersOf(task, "filters_out");
            filtersOut.addAll(settings.filtersOut);
            byte[] graph = content(task.graph);
            Map<String, Tensor> model = finite(Safetensors.floats(content(task.model)));
            for (Filter filter : filtersIn) model = filter.apply(model);
            Dataset dataset = source.dataset(task.name, task.config);
            examples = dataset.size();
            Map<String, Tensor> trained =
                    trainer.train(graph, new TrainingParams(task.config), model, dataset, random, goOn());
            Map<String, Tensor> delta = difference(trained, model);
            for (Filter filter : filtersOut) delta = filter.apply(delta);
            encoded = Deltas.encode(delta, settings.encoding, random::nextFloat, settings.compressed);
        } catch (GatewayUnavailable error) {
            throw error;
        } catch (TrainingStopped stopped) {
            tell("dropped", "why", stopped.getMessage());
            if (standing.state == Protocol.State.TRAINING) giveUp();
            return pause();
        } catch (Refused error) { // this task will not come right by trying it again
            refused(error);
            giveUp();
            return pause();
        }
        memory.keepResult(encoded);
        keep(new Standing(Protocol.TRAINED, standing.job, standing.name, task, Math.max(1, examples)));
        tell("trained", "version", task.version);
        return 0;
    }

    private void giveUp() {
        keep(new Standing(Protocol.GAVE_UP, standing.job, standing.name, null, standing.weight));
    }

    /** A blob's content, fetched from where its fetching broke off. */
    private byte[] content(Blob blob) {
        byte[] have = memory.blob(blob);
        while (have.length < blob.size + Crypto.TAG_SIZE) {
            have = connection.blob(blob, have);
            memory.keepBlob(blob, have);
        }
        try {
            return Sealing.openBlob(blob, have);
        } catch (Refused error) {
            memory.forgetBlob(blob);
            throw error;
        }
    }

    private static Map<String, Tensor> finite(Map<String, Tensor> model) {
        for (Tensor tensor : model.values()) {
            for (float value : tensor.values) {
                if (Float.isNaN(value) || Float.isInfinite(value)) throw new Refused("the model is not finite");
            }
        }
        return model;
    }

    private static Map<String, Tensor> difference(Map<String, Tensor> trained, Map<String, Tensor> model) {
        Map<String, Tensor> delta = new LinkedHashMap<>();
        for (Map.Entry<String, Tensor> one : model.entrySet()) {
            float[] before = one.getValue().values;
            Tensor after = trained.getOrDefault(one.getKey(), one.getValue());
            if (after.values.length != before.length) throw new Refused("a trained tensor has another shape");
            float[] values = new float[before.length];
            for (int at = 0; at < values.length; at++) values[at] = after.values[at] - before[at];
            delta.put(one.getKey(), new Tensor(one.getValue().shape, values));
        }
        return delta;
    }

    /** What a trainer calls before each step: raises TrainingStopped if it is to stop. */
    private Runnable goOn() {
        Instant[] asked = {clock.instant()};
        return () -> {
            String why = condition.why();
            if (why != null) throw new TrainingStopped(why);
            Instant at = clock.instant();
            if (at.isBefore(asked[0].plusMillis((long) (1000 * settings.selectionSeconds)))) return;
            asked[0] = at;
            Answer answer;
            try {
                answer = ask(Protocol.Message.SELECTION);
            } catch (Refused error) {
                return; // what is trained may still count; the result will be told otherwise
            }
            Protocol.Rule rule = Protocol.next(Protocol.Message.SELECTION, answer.status);
            if (rule.then == Protocol.State.TRAINING) return;
            go(rule, answer);
            throw new TrainingStopped("its version is trained no more");
        };
    }

    private void refused(Refused error) {
        Map<String, Object> details = new HashMap<>();
        details.put("why", error.getMessage());
        details.put("reasons", error.reasons());
        event.heard("refused", details);
    }

    private void tell(String name, String detail, Object value) {
        event.heard(name, Collections.singletonMap(detail, value));
    }
}
