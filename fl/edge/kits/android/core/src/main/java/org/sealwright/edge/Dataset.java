package org.sealwright.edge;

import java.util.Iterator;
import java.util.Random;

/** A device's examples for one job. */
public interface Dataset {
    /** How many examples there are. */
    int size();

    /** One pass over them, shuffled, in batches of exactly {@code size}; what is left over is left out. */
    Iterator<Batch> batches(int size, Random random);
}
