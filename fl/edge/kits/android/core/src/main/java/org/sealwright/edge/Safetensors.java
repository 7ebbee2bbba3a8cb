package org.sealwright.edge;

import java.io.ByteArrayOutputStream;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.regex.Pattern;

/** Safetensors files, strictly: ranges cover the data exactly once, and bounds are checked before allocation. */
public final class Safetensors {
    private static final int MAX_HEADER = 16 << 20;
    private static final int MAX_TENSORS = 100_000;
    private static final int MAX_NAME = 512;
    private static final int MAX_RANK = 16;
    private static final long MAX_COUNT = (1L << 48) - 1;
    private static final Pattern DTYPE = Pattern.compile("F64|F32|F16|BF16|I64|I32|I16|I8|U64|U32|U16|U8|BOOL");

    /** One tensor's bytes, little-endian. */
    static final class Raw {
        final String dtype;
        final long[] shape;
        final byte[] bytes;

        Raw(String dtype, long[] shape, byte[] bytes) {
            this.dtype = dtype;
            this.shape = shape;
            this.bytes = bytes;
        }
    }

    private static final class Entry {
        final String name;
        final String dtype;
        final long[] shape;
        final long begin;
        final long end;

        Entry(String name, Fields fields) {
            this.name = name;
            dtype = fields.text("dtype", DTYPE);
            shape = counts(fields.list("shape", MAX_RANK));
            long[] offsets = counts(fields.list("data_offsets", 2));
            fields.end();
            if (offsets.length != 2) throw new Refused("a tensor has no two offsets");
            begin = offsets[0];
            end = offsets[1];
            if (end - begin != size()) throw new Refused("a tensor's range is not as long as its shape says");
        }

        private long size() {
            try {
                long found = width(dtype);
                for (long one : shape) found = Math.multiplyExact(found, one);
                return found;
            } catch (ArithmeticException error) {
                throw new Refused("a tensor is too large");
            }
        }
    }

    private Safetensors() {}

    static int width(String dtype) {
        return dtype.endsWith("64") ? 8 : dtype.endsWith("32") ? 4 : dtype.endsWith("16") ? 2 : 1;
    }

    /** The tensors of floats in a whole file, as float32. Raises Refused for every deviation from the format. */
    public static Map<String, Tensor> floats(byte[] file) {
        int data = 8 + headerLength(file);
        Map<String, Object> header = header(Bytes.cut(file, 8, data));
        Object metadata = header.remove("__metadata__");
        if (metadata != null) {
            if (!(metadata instanceof Map)) throw new Refused("__metadata__ is no map");
            for (Object value : ((Map<?, ?>) metadata).values()) {
                if (!(value instanceof String)) throw new Refused("__metadata__ is no map of strings");
            }
        }
        if (header.size() > MAX_TENSORS) throw new Refused("there are too many tensors");
        List<Entry> entries = new ArrayList<>();
        Fields named = new Fields(header, "header");
        for (String name : header.keySet()) {
            if (!isPrintable(name)) throw new Refused("a tensor's name is too long, empty or unprintable");
            entries.add(new Entry(name, named.fields(name)));
        }
        List<Entry> ordered = new ArrayList<>(entries);
        ordered.sort(Comparator.<Entry>comparingLong(one -> one.begin).thenComparingLong(one -> one.end));
        long at = 0;
        for (Entry entry : ordered) {
            if (entry.begin != at) throw new Refused("ranges overlap or leave a hole");
            at = entry.end;
        }
        if (data + at != file.length) throw new Refused("the data does not end with the file");
        Map<String, Tensor> found = new LinkedHashMap<>();
        for (Entry entry : entries) {
            if (entry.dtype.indexOf('F') < 0) continue;
            ByteBuffer bytes = ByteBuffer.wrap(file, (int) (data + entry.begin), (int) (entry.end - entry.begin));
            found.put(entry.name, new Tensor(entry.shape, widened(bytes.order(ByteOrder.LITTLE_ENDIAN), entry.dtype)));
        }
        return found;
    }

    /** One file, in the reference's own layout: by descending alignment, then name. */
    static byte[] encode(Map<String, Raw> tensors) {
        List<String> order = new ArrayList<>(tensors.keySet());
        order.sort(Comparator.<String>comparingInt(name -> -width(tensors.get(name).dtype))
                .thenComparing(Safetensors::byCodePoints));
        StringBuilder header = new StringBuilder("{");
        long at = 0;
        for (String name : order) {
            Raw raw = tensors.get(name);
            if (header.length() > 1) header.append(',');
            header.append(text(name)).append(":{\"dtype\":\"").append(raw.dtype).append("\",\"shape\":");
            header.append(java.util.Arrays.toString(raw.shape).replace(" ", ""));
            header.append(",\"data_offsets\":[").append(at).append(',').append(at + raw.bytes.length).append("]}");
            at += raw.bytes.length;
        }
        byte[] text = Bytes.utf8(header.append('}').toString());
        int padded = text.length + Math.floorMod(-text.length, 8);
        ByteArrayOutputStream out = new ByteArrayOutputStream();
        byte[] length = ByteBuffer.allocate(8).order(ByteOrder.LITTLE_ENDIAN).putLong(padded).array();
        out.write(length, 0, 8);
        out.write(text, 0, text.length);
        for (int blank = text.length; blank < padded; blank++) out.write(' ');
        for (String name : order) out.write(tensors.get(name).bytes, 0, tensors.get(name).bytes.length);
        return out.toByteArray();
    }

    private static int headerLength(byte[] file) {
        if (file.length < 8) throw new Refused("the file ends before its header length");
        long length = ByteBuffer.wrap(file).order(ByteOrder.LITTLE_ENDIAN).getLong();
        if (length < 0 || length > MAX_HEADER || length > file.length - 8) throw new Refused("the header is too long");
        return (int) length;
    }

    private static Map<String, Object> header(byte[] raw) {
        if (raw.length == 0 || raw[0] != '{') throw new Refused("the header does not begin with {");
        return Json.read(raw, MAX_HEADER);
    }

    private static long[] counts(List<Object> values) {
        long[] found = new long[values.size()];
        for (int at = 0; at < found.length; at++) {
            Object value = values.get(at);
            if (!(value instanceof Long) || (Long) value < 0 || (Long) value > MAX_COUNT) {
                throw new Refused("a count is none");
            }
            found[at] = (Long) value;
        }
        return found;
    }

    private static boolean isPrintable(String name) {
        int length = name.codePointCount(0, name.length());
        return length > 0 && length <= MAX_NAME && name.codePoints().allMatch(Safetensors::isPrintable);
    }

    private static boolean isPrintable(int point) {
        switch (Character.getType(point)) {
            case Character.CONTROL: case Character.FORMAT: case Character.SURROGATE: case Character.PRIVATE_USE:
            case Character.UNASSIGNED: case Character.LINE_SEPARATOR: case Character.PARAGRAPH_SEPARATOR:
                return false;
            case Character.SPACE_SEPARATOR:
                return point == ' ';
            default:
                return true;
        }
    }

    private static float[] widened(ByteBuffer bytes, String dtype) {
        float[] found = new float[bytes.remaining() / width(dtype)];
        for (int at = 0; at < found.length; at++) {
            switch (dtype) {
                case "F64": found[at] = (float) bytes.getDouble(); break;
                case "F32": found[at] = bytes.getFloat(); break;
                case "F16": found[at] = half(bytes.getShort()); break;
                default: found[at] = Float.intBitsToFloat(bytes.getShort() << 16); break;
            }
        }
        return found;
    }

    /** IEEE 754 binary16. */
    private static float half(short bits) {
        int exponent = (bits >> 10) & 31;
        int fraction = bits & 0x3ff;
        float size = exponent == 0
                ? fraction * 0x1p-24f
                : Float.intBitsToFloat((exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13);
        return bits < 0 ? -size : size;
    }

    private static String text(String name) {
        return new String(CanonicalJson.write(name), java.nio.charset.StandardCharsets.UTF_8);
    }

    private static int byCodePoints(String one, String other) {
        int[] left = one.codePoints().toArray();
        int[] right = other.codePoints().toArray();
        for (int at = 0; at < Math.min(left.length, right.length); at++) {
            if (left[at] != right[at]) return Integer.compare(left[at], right[at]);
        }
        return Integer.compare(left.length, right.length);
    }
}
