package org.sealwright.edge;

import java.io.ByteArrayOutputStream;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.zip.Deflater;

/** How a device's difference from a model travels (docs/reference/device-protocol.md). */
public final class Deltas {
    public enum Encoding {
        F32("f32", "F32"), BF16("bf16", "BF16"), INT8("int8", "I8");

        public final String word;
        final String dtype;

        Encoding(String word, String dtype) {
            this.word = word;
            this.dtype = dtype;
        }
    }

    /** Random numbers, uniform in [0, 1), by which {@code int8} rounds. */
    public interface Draws {
        float next();
    }

    private static final String SCALE = "#scale";

    private Deltas() {}

    /** Write finite tensors. Raises Refused for a number that is not finite. */
    public static byte[] encode(Map<String, Tensor> tensors, Encoding encoding, Draws draws, boolean compressed) {
        Map<String, Safetensors.Raw> parts = new LinkedHashMap<>();
        for (Map.Entry<String, Tensor> one : tensors.entrySet()) {
            Tensor tensor = one.getValue();
            int width = Safetensors.width(encoding.dtype);
            ByteBuffer bytes = ByteBuffer.allocate(Math.multiplyExact(tensor.values.length, width));
            bytes.order(ByteOrder.LITTLE_ENDIAN);
            float largest = largest(one.getKey(), tensor.values);
            float scale = largest / 127f;
            for (float value : tensor.values) {
                switch (encoding) {
                    case F32: bytes.putFloat(value); break;
                    case BF16: bytes.putShort(narrowed(value)); break;
                    default: bytes.put(rounded(value, scale, draws.next())); break;
                }
            }
            parts.put(one.getKey(), new Safetensors.Raw(encoding.dtype, tensor.shape, bytes.array()));
            if (encoding == Encoding.INT8) {
                byte[] raw = ByteBuffer.allocate(4).order(ByteOrder.LITTLE_ENDIAN).putFloat(scale).array();
                parts.put(one.getKey() + SCALE, new Safetensors.Raw("F32", new long[0], raw));
            }
        }
        byte[] raw = Safetensors.encode(parts);
        return compressed ? deflated(raw) : raw;
    }

    private static float largest(String name, float[] values) {
        float largest = 0;
        for (float value : values) {
            if (Float.isNaN(value) || Float.isInfinite(value)) {
                throw new Refused("tensor '" + name + "' holds a number that is not finite");
            }
            largest = Math.max(largest, Math.abs(value));
        }
        return largest;
    }

    /** To the nearest BF16, ties to even. */
    private static short narrowed(float value) {
        int bits = Float.floatToRawIntBits(value);
        return (short) ((bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16);
    }

    /** Up with the probability that makes the mean right. */
    private static byte rounded(float value, float scale, float draw) {
        float steps = scale > 0 ? value / scale : 0;
        float low = (float) Math.floor(steps);
        float found = low + (draw < steps - low ? 1 : 0);
        return (byte) Math.max(-127, Math.min(127, found));
    }

    private static byte[] deflated(byte[] raw) {
        Deflater deflater = new Deflater(Deflater.BEST_SPEED);
        try {
            deflater.setInput(raw);
            deflater.finish();
            ByteArrayOutputStream out = new ByteArrayOutputStream();
            byte[] piece = new byte[1 << 16];
            while (!deflater.finished()) out.write(piece, 0, deflater.deflate(piece));
            return out.toByteArray();
        } finally {
            deflater.end();
        }
    }
}
