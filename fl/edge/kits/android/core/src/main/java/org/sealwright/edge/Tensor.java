package org.sealwright.edge;

/** Numbers of a shape, row by row. */
public final class Tensor {
    public final long[] shape;
    public final float[] values;

    public Tensor(long[] shape, float[] values) {
        this.shape = shape.clone();
        this.values = values;
    }
}
