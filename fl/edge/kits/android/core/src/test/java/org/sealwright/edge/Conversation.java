package org.sealwright.edge;

import java.nio.file.Files;
import java.nio.file.Path;
import java.nio.file.Paths;
import java.time.Clock;
import java.util.Collections;
import java.util.LinkedHashMap;
import java.util.Map;

/**
 * A device that talks with a real gateway: {@code Conversation SETTINGS FOLDER}. It goes on until it hears the event
 * that the settings name, or for the steps that they allow, and prints each event as a line of JSON.
 */
public final class Conversation {
    private static final int LIMIT = 1 << 20;

    private Conversation() {}

    public static void main(String[] arguments) throws Exception {
        Fields settings = new Fields(Json.read(Files.readAllBytes(Paths.get(arguments[0])), LIMIT), "settings");
        Path folder = Paths.get(arguments[1]);
        String until = settings.text("until", Fields.ANY);
        boolean[] heard = {false};
        Event event = (name, details) -> {
            Map<String, Object> said = new LinkedHashMap<>(details);
            said.put("event", name);
            System.out.println(new String(CanonicalJson.write(said), java.nio.charset.StandardCharsets.UTF_8));
            heard[0] |= name.equals(until);
        };
        DeviceSettings own = new DeviceSettings(Collections.singletonList("heart-*"));
        own.capabilities = Collections.singletonMap("os", "linux");
        own.encoding = Deltas.Encoding.valueOf(settings.text("encoding", Fields.ANY));
        own.compressed = (Boolean) settings.any("compressed");
        own.waitSeconds = 0;
        own.selectionSeconds = 0;
        Trust trust = new Trust(Bytes.utf8(settings.text("root", Fields.ANY)), (Boolean) settings.any("production"));
        Device device = new Device(
                new GatewayConnection(new UrlTransport(settings.text("url", Fields.ANY))), trust,
                settings.text("token", Fields.ANY), VectorTests.key(settings.text("key", Fields.ANY)),
                (job, config) -> new Examples(), components(),
                folder, own, () -> null, event, Clock.systemUTC());
        for (long step = settings.integer("steps", 1, 1000); step > 0 && !heard[0]; step--) {
            Thread.sleep((long) (1000 * Math.min(device.step(), 0.2)));
        }
        if (!heard[0]) System.exit(1);
    }

    private static ComponentResolver components() {
        return new ComponentResolver().trainer("executorch", Conversation::trained).filter("double", tensors -> {
            Map<String, Tensor> found = new LinkedHashMap<>();
            tensors.forEach((name, tensor) -> {
                float[] values = tensor.values.clone();
                for (int at = 0; at < values.length; at++) values[at] *= 2;
                found.put(name, new Tensor(tensor.shape, values));
            });
            return found;
        });
    }

    /** Adds 0.5 to every number: it shows what a device does around training, not training. */
    private static Map<String, Tensor> trained(
            byte[] graph, TrainingParams params, Map<String, Tensor> model, Dataset dataset, java.util.Random random,
            Runnable goOn) {
        goOn.run();
        Map<String, Tensor> found = new LinkedHashMap<>();
        model.forEach((name, tensor) -> {
            float[] values = tensor.values.clone();
            for (int at = 0; at < values.length; at++) values[at] += 0.5f;
            found.put(name, new Tensor(tensor.shape, values));
        });
        return found;
    }

    private static final class Examples implements Dataset {
        @Override
        public int size() { return 8; }

        @Override
        public java.util.Iterator<Batch> batches(int size, java.util.Random random) {
            return Collections.emptyIterator();
        }
    }
}
