package org.sealwright.edge.android;

import java.io.File;
import java.io.IOException;
import java.nio.file.Files;
import java.util.Arrays;
import java.util.HashMap;
import java.util.Iterator;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.Random;
import org.pytorch.executorch.EValue;
import org.pytorch.executorch.training.SGD;
import org.pytorch.executorch.training.TrainingModule;
import org.sealwright.edge.Batch;
import org.sealwright.edge.Dataset;
import org.sealwright.edge.Refused;
import org.sealwright.edge.Tensor;
import org.sealwright.edge.Trainer;
import org.sealwright.edge.TrainingParams;

/** Stochastic gradient descent over the task's graph, by ExecuTorch. */
public final class ExecuTorchTrainer implements Trainer {
    private static final String METHOD = "forward";
    private static final String WRAPPER = "net.";
    private final File folder;

    /** {@code folder}: the app's own cache, for the graph while it is trained. */
    public ExecuTorchTrainer(File folder) { this.folder = folder; }

    @Override
    public Map<String, Tensor> train(
            byte[] graph, TrainingParams params, Map<String, Tensor> model, Dataset dataset, Random random, Runnable goOn) {
        File file = null;
        try {
            file = File.createTempFile("graph", ".pte", folder);
            Files.write(file.toPath(), graph);
            return trained(TrainingModule.load(file.getPath()), params, model, dataset, random, goOn);
        } catch (IOException error) {
            throw new Refused("the graph cannot be kept: " + error.getClass().getSimpleName());
        } finally {
            if (file != null) file.delete();
        }
    }

    private static Map<String, Tensor> trained(
            TrainingModule module, TrainingParams params, Map<String, Tensor> model, Dataset dataset, Random random,
            Runnable goOn) {
        Iterator<Batch> batches = dataset.batches(params.batchSize, random);
        if (!batches.hasNext()) {
            throw new Refused("the device has " + dataset.size() + " examples, fewer than a batch of " + params.batchSize);
        }
        // The program allocates its parameters when it runs first.
        module.executeForwardBackward(METHOD, values(batches.next()));
        Map<String, org.pytorch.executorch.Tensor> parameters = module.namedParameters(METHOD);
        set(parameters, model);
        SGD optimiser =
                SGD.create(parameters, params.lr, params.momentum, 0, params.weightDecay, false);
        for (int epoch = 0; epoch < params.epoch; epoch++) {
            for (batches = dataset.batches(params.batchSize, random); batches.hasNext(); ) {
                goOn.run();
                module.executeForwardBackward(METHOD, values(batches.next()));
                optimiser.step(module.namedGradients(METHOD));
            }
        }
        Map<String, Tensor> found = new LinkedHashMap<>();
        module.namedParameters(METHOD).forEach((name, value) ->
                found.put(own(name), new Tensor(value.shape(), value.getDataAsFloatArray())));
        return found;
    }

    private static String own(String name) {
        return name.startsWith(WRAPPER) ? name.substring(WRAPPER.length()) : name;
    }

    /**
     * Give the parameters the model's numbers. ExecuTorch's Java tensors cannot be written to; its optimiser writes: two
     * steps at rate 1, down to exactly zero and up from there.
     */
    private static void set(Map<String, org.pytorch.executorch.Tensor> parameters, Map<String, Tensor> model) {
        if (parameters.size() != model.size()) throw new Refused("the graph's parameters are not the model's tensors");
        Map<String, org.pytorch.executorch.Tensor> down = new HashMap<>();
        Map<String, org.pytorch.executorch.Tensor> up = new HashMap<>();
        parameters.forEach((name, value) -> {
            Tensor wanted = model.get(own(name));
            if (wanted == null || !Arrays.equals(wanted.shape, value.shape())) {
                throw new Refused("the graph's parameters are not the model's tensors");
            }
            float[] negated = wanted.values.clone();
            for (int at = 0; at < negated.length; at++) negated[at] = -negated[at];
            down.put(name, org.pytorch.executorch.Tensor.fromBlob(value.getDataAsFloatArray(), value.shape()));
            up.put(name, org.pytorch.executorch.Tensor.fromBlob(negated, value.shape()));
        });
        SGD setting = SGD.create(parameters, 1.0);
        setting.step(down);
        setting.step(up);
        setting.destroy();
    }

    private static EValue[] values(Batch batch) {
        org.pytorch.executorch.Tensor labels = batch.labels != null
                ? org.pytorch.executorch.Tensor.fromBlob(batch.labels, new long[] {batch.labels.length})
                : tensor(batch.targets);
        return new EValue[] {EValue.from(tensor(batch.inputs)), EValue.from(labels)};
    }

    private static org.pytorch.executorch.Tensor tensor(Tensor values) {
        return org.pytorch.executorch.Tensor.fromBlob(values.values, values.shape);
    }
}
