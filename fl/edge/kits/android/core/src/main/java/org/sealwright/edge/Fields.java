package org.sealwright.edge;

import java.util.ArrayList;
import java.util.LinkedHashSet;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.regex.Pattern;

/** The fields of one JSON object, read strictly: each has its type and bounds, and {@link #end} refuses all others. */
public final class Fields {
    public static final Pattern HEX32 = Pattern.compile("[0-9a-f]{64}");
    public static final Pattern NAME = Pattern.compile("[a-z0-9][a-z0-9._-]{0,62}");
    public static final Pattern JOB = Pattern.compile("[a-zA-Z0-9][a-zA-Z0-9._-]{0,127}");
    public static final Pattern COOKIE = Pattern.compile("[0-9a-f]{1,256}");
    public static final Pattern WORD = Pattern.compile(".{1,128}", Pattern.DOTALL);
    public static final Pattern ANY = Pattern.compile(".*", Pattern.DOTALL);

    private final Map<String, Object> values;
    private final String where;
    private final Set<String> unread;

    public Fields(Map<String, Object> values, String where) {
        this.values = values;
        this.where = where;
        this.unread = new LinkedHashSet<>(values.keySet());
    }

    /** Whether there is such a field, and not null. */
    public boolean has(String name) {
        if (values.get(name) != null) return true;
        unread.remove(name);
        return false;
    }

    public boolean isGiven(String name) { return values.containsKey(name); }

    public Object any(String name) {
        unread.remove(name);
        return values.get(name);
    }

    public String text(String name, Pattern form) {
        Object value = any(name);
        if (!(value instanceof String) || !form.matcher((String) value).matches()) throw bad(name);
        return (String) value;
    }

    /** A text of {@code form}, or null where there is none. */
    public String textOrNull(String name, Pattern form) { return has(name) ? text(name, form) : null; }

    public long integer(String name, long least, long most) {
        Object value = any(name);
        if (!(value instanceof Long) || (Long) value < least || (Long) value > most) throw bad(name);
        return (Long) value;
    }

    public double number(String name, double least, double most) {
        Object value = any(name);
        if (!(value instanceof Long || value instanceof Double)) throw bad(name);
        double number = ((Number) value).doubleValue();
        if (!(least <= number && number <= most)) throw bad(name);
        return number;
    }

    @SuppressWarnings("unchecked") // Json makes maps with String keys alone
    public Map<String, Object> object(String name) {
        Object value = any(name);
        if (!(value instanceof Map)) throw bad(name);
        return (Map<String, Object>) value;
    }

    public Fields fields(String name) { return new Fields(object(name), where + "." + name); }

    public List<Object> list(String name, int most) {
        Object value = any(name);
        if (!(value instanceof List) || ((List<?>) value).size() > most) throw bad(name);
        return new ArrayList<>((List<?>) value);
    }

    public List<String> texts(String name, Pattern form, int most) {
        List<String> found = new ArrayList<>();
        for (Object item : list(name, most)) {
            if (!(item instanceof String) || !form.matcher((String) item).matches()) throw bad(name);
            found.add((String) item);
        }
        return found;
    }

    @SuppressWarnings("unchecked")
    public List<Fields> objects(String name, int most) {
        List<Fields> found = new ArrayList<>();
        for (Object item : list(name, most)) {
            if (!(item instanceof Map)) throw bad(name);
            found.add(new Fields((Map<String, Object>) item, where + "." + name));
        }
        return found;
    }

    public Map<String, Object> values() { return values; }

    /** Refuse fields that nothing has read. */
    public void end() {
        if (!unread.isEmpty()) throw new Refused(where + ": unknown fields " + unread);
    }

    private Refused bad(String name) { return new Refused(where + "." + name + " is not what it must be"); }
}
