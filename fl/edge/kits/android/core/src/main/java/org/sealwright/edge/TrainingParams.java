package org.sealwright.edge;

import java.util.Map;

/** What of a task's configuration the trainer reads, by NVIDIA FLARE's names; other entries are the app's. */
public final class TrainingParams {
    public final int epoch;
    public final int batchSize;
    public final double lr;
    public final double momentum;
    public final double weightDecay;

    public TrainingParams(Map<String, Object> config) {
        Fields fields = new Fields(config, "device_training_params");
        epoch = fields.isGiven("epoch") ? (int) fields.integer("epoch", 1, 1000) : 1;
        batchSize = (int) fields.integer("batch_size", 1, 65536);
        lr = fields.number("lr", Double.MIN_VALUE, 1e3);
        momentum = fields.isGiven("momentum") ? fields.number("momentum", 0, Math.nextDown(1.0)) : 0;
        weightDecay = fields.isGiven("weight_decay") ? fields.number("weight_decay", 0, 1) : 0;
    }
}
