package org.sealwright.edge;

import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/**
 * The components that an app has, by name. A task's configuration, which the charter approves, may name filters in
 * {@code filters_in} and {@code filters_out}; its format names the trainer. A name that the app does not have refuses
 * the task: nothing is loaded or guessed.
 */
public final class ComponentResolver {
    private final Map<String, Trainer> trainers = new LinkedHashMap<>();
    private final Map<String, Filter> filters = new LinkedHashMap<>();

    public ComponentResolver trainer(String format, Trainer trainer) {
        trainers.put(format, trainer);
        return this;
    }

    public ComponentResolver filter(String name, Filter filter) {
        filters.put(name, filter);
        return this;
    }

    Trainer trainerOf(Task task) {
        Trainer found = trainers.get(task.format);
        if (found == null) throw new Refused("this app has no trainer for " + task.format);
        return found;
    }

    /** The filters that the task's configuration names under {@code place}, in their order. */
    List<Filter> filtersOf(Task task, String place) {
        List<Filter> found = new ArrayList<>();
        if (!task.config.containsKey(place)) return found;
        for (String name : new Fields(task.config, "config").texts(place, Fields.WORD, 16)) {
            Filter filter = filters.get(name);
            if (filter == null) throw new Refused("this app has no filter " + name);
            found.add(filter);
        }
        return found;
    }
}
