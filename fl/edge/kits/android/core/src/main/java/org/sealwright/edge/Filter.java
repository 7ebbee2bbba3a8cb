package org.sealwright.edge;

import java.util.Map;

/** Turns a model (before training) or a difference (before it is sent) into another with the same names and shapes. */
public interface Filter {
    Map<String, Tensor> apply(Map<String, Tensor> tensors);
}
