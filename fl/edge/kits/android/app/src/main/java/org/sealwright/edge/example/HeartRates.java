package org.sealwright.edge.example;

import java.util.ArrayList;
import java.util.Collections;
import java.util.Iterator;
import java.util.List;
import java.util.Random;
import org.sealwright.edge.Batch;
import org.sealwright.edge.Dataset;
import org.sealwright.edge.Tensor;

/** Four measurements an example, and whether the user was at rest: what an app would read from its own records. */
final class HeartRates implements Dataset {
    private static final float[][] INPUTS = {
        {0.61f, 0.62f, 0.60f, 0.63f}, {0.95f, 1.10f, 1.20f, 1.31f}, {0.58f, 0.57f, 0.59f, 0.58f},
        {1.40f, 1.38f, 1.29f, 1.17f}, {0.66f, 0.64f, 0.65f, 0.66f}, {1.02f, 1.15f, 1.33f, 1.41f},
        {0.70f, 0.69f, 0.71f, 0.70f}, {1.21f, 1.24f, 1.19f, 1.28f},
    };
    private static final long[] AT_REST = {1, 0, 1, 0, 1, 0, 1, 0};

    @Override
    public int size() { return INPUTS.length; }

    @Override
    public Iterator<Batch> batches(int size, Random random) {
        List<Integer> order = new ArrayList<>();
        for (int at = 0; at < INPUTS.length; at++) order.add(at);
        Collections.shuffle(order, random);
        List<Batch> found = new ArrayList<>();
        for (int at = 0; at + size <= order.size(); at += size) found.add(batch(order.subList(at, at + size)));
        return found.iterator();
    }

    private static Batch batch(List<Integer> chosen) {
        int width = INPUTS[0].length;
        float[] values = new float[chosen.size() * width];
        long[] labels = new long[chosen.size()];
        for (int row = 0; row < labels.length; row++) {
            System.arraycopy(INPUTS[chosen.get(row)], 0, values, row * width, width);
            labels[row] = AT_REST[chosen.get(row)];
        }
        return Batch.ofClasses(new Tensor(new long[] {labels.length, width}, values), labels);
    }
}
