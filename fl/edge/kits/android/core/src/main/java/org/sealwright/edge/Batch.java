package org.sealwright.edge;

/** One step's inputs, of the graph's input shape, and labels: class numbers or float32, as the graph takes them. */
public final class Batch {
    public final Tensor inputs;
    /** Class numbers; null if the labels are {@code targets}. */
    public final long[] labels;
    /** Labels that are numbers; null if they are {@code labels}. */
    public final Tensor targets;

    private Batch(Tensor inputs, long[] labels, Tensor targets) {
        this.inputs = inputs;
        this.labels = labels;
        this.targets = targets;
    }

    public static Batch ofClasses(Tensor inputs, long[] labels) { return new Batch(inputs, labels, null); }

    public static Batch ofNumbers(Tensor inputs, Tensor targets) { return new Batch(inputs, null, targets); }
}
