package org.sealwright.edge;

import java.util.ArrayList;
import java.util.Arrays;
import java.util.Collections;
import java.util.List;

/** Something did not hold: nothing was sent, or believed. It names every reason. */
public class Refused extends RuntimeException {
    private static final long serialVersionUID = 1L;
    private final ArrayList<String> reasons;

    public Refused(String... reasons) { this(Arrays.asList(reasons)); }

    public Refused(List<String> reasons) {
        super(reasons.get(0));
        this.reasons = new ArrayList<>(reasons);
    }

    public List<String> reasons() { return Collections.unmodifiableList(reasons); }
}
