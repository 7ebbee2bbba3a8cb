package org.sealwright.edge;

import java.math.BigDecimal;
import java.math.MathContext;
import java.math.RoundingMode;
import java.nio.charset.StandardCharsets;
import java.util.Map;
import java.util.TreeMap;

/** Writing JSON in the canonical form of RFC 8785, and in the one that TUF signs. */
public final class CanonicalJson {
    private final StringBuilder out = new StringBuilder();
    private final boolean tuf;

    private CanonicalJson(boolean tuf) { this.tuf = tuf; }

    /** RFC 8785. Raises Refused for what it cannot express. */
    public static byte[] write(Object value) { return written(value, false); }

    /** The canonical JSON of TUF's signatures: it escapes quotes and backslashes alone, and has no fractions. */
    static byte[] writeForTuf(Object value) { return written(value, true); }

    private static byte[] written(Object value, boolean tuf) {
        CanonicalJson writer = new CanonicalJson(tuf);
        writer.value(value);
        return writer.out.toString().getBytes(StandardCharsets.UTF_8);
    }

    private void value(Object value) {
        if (value == null || value instanceof Boolean) out.append(value);
        else if (value instanceof String) string((String) value);
        else if (value instanceof Integer || value instanceof Long) integer(((Number) value).longValue());
        else if (value instanceof Double && !tuf) out.append(number((Double) value));
        else if (value instanceof Map) object((Map<?, ?>) value);
        else if (value instanceof Iterable) list((Iterable<?>) value);
        else throw new Refused("a value has no canonical JSON form");
    }

    private void object(Map<?, ?> value) {
        Map<String, Object> sorted = new TreeMap<>(); // by UTF-16 code units, as RFC 8785 asks
        for (Map.Entry<?, ?> entry : value.entrySet()) sorted.put((String) entry.getKey(), entry.getValue());
        char before = '{';
        for (Map.Entry<String, Object> entry : sorted.entrySet()) {
            out.append(before);
            string(entry.getKey());
            out.append(':');
            value(entry.getValue());
            before = ',';
        }
        out.append(before == '{' ? "{}" : "}");
    }

    private void list(Iterable<?> value) {
        char before = '[';
        for (Object item : value) {
            out.append(before);
            value(item);
            before = ',';
        }
        out.append(before == '[' ? "[]" : "]");
    }

    private void string(String value) {
        out.append('"');
        for (int at = 0; at < value.length(); at++) {
            char letter = value.charAt(at);
            if (letter == '"' || letter == '\\') out.append('\\').append(letter);
            else if (letter >= 0x20 || tuf) out.append(letter);
            else out.append(control(letter));
        }
        out.append('"');
    }

    private static String control(char letter) {
        int short_ = "\b\t\n\f\r".indexOf(letter);
        return short_ >= 0 ? "\\" + "btnfr".charAt(short_) : String.format("\\u%04x", (int) letter);
    }

    private void integer(long value) {
        if (Math.abs(value) > Json.MAX_INTEGER) throw new Refused("an integer has more than 53 bits");
        out.append(value);
    }

    /** ECMAScript's shortest form: the fewest digits that read back as the same number. */
    static String number(double value) {
        if (Double.isNaN(value) || Double.isInfinite(value)) throw new Refused("a number is not finite");
        if (value == 0) return "0";
        double size = Math.abs(value);
        BigDecimal found = shortest(size).stripTrailingZeros();
        String digits = found.unscaledValue().toString();
        int count = digits.length();
        int point = count - found.scale();
        return (value < 0 ? "-" : "") + placed(digits, count, point);
    }

    private static BigDecimal shortest(double size) {
        BigDecimal exact = new BigDecimal(size);
        for (int digits = 1; digits < 17; digits++) {
            // The nearest first; at a power of two the one above it may read back where the nearest does not.
            for (RoundingMode mode : new RoundingMode[] {RoundingMode.HALF_EVEN, RoundingMode.UP}) {
                BigDecimal found = exact.round(new MathContext(digits, mode));
                if (found.doubleValue() == size) return found;
            }
        }
        return exact.round(new MathContext(17, RoundingMode.HALF_EVEN));
    }

    private static String placed(String digits, int count, int point) {
        if (count <= point && point <= 21) return digits + zeros(point - count);
        if (0 < point && point <= 21) return digits.substring(0, point) + "." + digits.substring(point);
        if (-6 < point && point <= 0) return "0." + zeros(-point) + digits;
        String fraction = count == 1 ? "" : "." + digits.substring(1);
        return digits.charAt(0) + fraction + "e" + (point > 0 ? "+" : "-") + Math.abs(point - 1);
    }

    private static String zeros(int count) {
        StringBuilder found = new StringBuilder();
        while (found.length() < count) found.append('0');
        return found.toString();
    }
}
