package org.sealwright.edge;

import java.util.Map;
import java.util.Random;

/** Trains a model on a device's examples. */
public interface Trainer {
    /**
     * The trained parameters of {@code model}, by its names. Calls {@code goOn} before each step, which raises
     * TrainingStopped. Raises Refused for a graph or a configuration with which it cannot.
     */
    Map<String, Tensor> train(
            byte[] graph, TrainingParams params, Map<String, Tensor> model, Dataset dataset, Random random, Runnable goOn);
}
