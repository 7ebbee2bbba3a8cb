package org.sealwright.edge;

import java.io.ByteArrayOutputStream;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.Base64;

/** Bytes as text and back, each in one form alone. */
public final class Bytes {
    private static final char[] HEX = "0123456789abcdef".toCharArray();

    private Bytes() {}

    public static String hex(byte[] raw) {
        StringBuilder text = new StringBuilder(2 * raw.length);
        for (byte one : raw) text.append(HEX[(one >> 4) & 15]).append(HEX[one & 15]);
        return text.toString();
    }

    /** Lower-case hex. Raises Refused. */
    public static byte[] unhex(String text) {
        if (text.length() % 2 != 0 || !text.matches("[0-9a-f]*")) throw new Refused("this is no hex");
        byte[] raw = new byte[text.length() / 2];
        for (int at = 0; at < raw.length; at++) raw[at] = (byte) Integer.parseInt(text.substring(2 * at, 2 * at + 2), 16);
        return raw;
    }

    /** Standard, padded base64. Raises Refused. */
    public static byte[] unb64(String text) {
        byte[] raw = decoded(Base64.getDecoder(), text);
        if (!Base64.getEncoder().encodeToString(raw).equals(text)) throw new Refused("this base64 is not canonical");
        return raw;
    }

    /** Base64url without padding. Raises Refused. */
    static byte[] unb64url(String text) {
        byte[] raw = decoded(Base64.getUrlDecoder(), text);
        String canonical = Base64.getUrlEncoder().withoutPadding().encodeToString(raw);
        if (!canonical.equals(text)) throw new Refused("this base64url is not canonical");
        return raw;
    }

    private static byte[] decoded(Base64.Decoder decoder, String text) {
        try {
            return decoder.decode(text);
        } catch (IllegalArgumentException error) {
            throw new Refused("this is no base64");
        }
    }

    static byte[] utf8(String text) { return text.getBytes(StandardCharsets.UTF_8); }

    static byte[] join(byte[]... parts) {
        ByteArrayOutputStream all = new ByteArrayOutputStream();
        for (byte[] part : parts) all.write(part, 0, part.length);
        return all.toByteArray();
    }

    static byte[] cut(byte[] raw, int start, int stop) { return Arrays.copyOfRange(raw, start, stop); }
}
