package org.sealwright.edge;

import java.nio.ByteBuffer;
import java.nio.CharBuffer;
import java.nio.charset.CharacterCodingException;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/**
 * JSON, strictly: one object, no doubled keys, bounded depth, integers of 53 bits.
 *
 * <p>Values are Map, List, String, Boolean, Long, Double and null.
 */
public final class Json {
    static final long MAX_INTEGER = (1L << 53) - 1;
    private static final int MAX_DEPTH = 128;

    private final String text;
    private int at;

    private Json(String text) { this.text = text; }

    /** One object in any layout. Raises Refused. */
    public static Map<String, Object> read(byte[] raw, int limit) {
        if (raw.length > limit) throw new Refused("a document has more than " + limit + " bytes");
        Json reader;
        try {
            reader = new Json(StandardCharsets.UTF_8.newDecoder().decode(ByteBuffer.wrap(raw)).toString());
        } catch (CharacterCodingException error) {
            throw new Refused("a document is not UTF-8");
        }
        reader.blanks();
        if (reader.peek() != '{') throw new Refused("this is no JSON object");
        Map<String, Object> value = reader.object(0);
        reader.blanks();
        if (reader.at != reader.text.length()) throw reader.none();
        return value;
    }

    /** One object in its canonical form (RFC 8785). Raises Refused for anything else. */
    public static Map<String, Object> readCanonical(byte[] raw, int limit) {
        Map<String, Object> value = read(raw, limit);
        if (!Arrays.equals(CanonicalJson.write(value), raw)) throw new Refused("a document is not in canonical form");
        return value;
    }

    private Object value(int depth) {
        if (depth > MAX_DEPTH) throw new Refused("a document is nested too deeply");
        switch (peek()) {
            case '{': return object(depth);
            case '[': return list(depth);
            case '"': return string();
            case 't': return word("true", Boolean.TRUE);
            case 'f': return word("false", Boolean.FALSE);
            case 'n': return word("null", null);
            default: return number();
        }
    }

    private Map<String, Object> object(int depth) {
        Map<String, Object> found = new LinkedHashMap<>();
        at++;
        blanks();
        if (take('}')) return found;
        while (true) {
            if (peek() != '"') throw none();
            String name = string();
            blanks();
            if (!take(':')) throw none();
            blanks();
            if (found.containsKey(name)) throw new Refused("a key occurs twice");
            found.put(name, value(depth + 1));
            blanks();
            if (take('}')) return found;
            if (!take(',')) throw none();
            blanks();
        }
    }

    private List<Object> list(int depth) {
        List<Object> found = new ArrayList<>();
        at++;
        blanks();
        if (take(']')) return found;
        while (true) {
            found.add(value(depth + 1));
            blanks();
            if (take(']')) return found;
            if (!take(',')) throw none();
            blanks();
        }
    }

    private String string() {
        StringBuilder found = new StringBuilder();
        at++;
        while (true) {
            char letter = next();
            if (letter == '"') break;
            if (letter < 0x20) throw none();
            found.append(letter == '\\' ? escaped() : letter);
        }
        if (!StandardCharsets.UTF_8.newEncoder().canEncode(CharBuffer.wrap(found))) throw none();
        return found.toString();
    }

    private char escaped() {
        char letter = next();
        switch (letter) {
            case '"': case '\\': case '/': return letter;
            case 'b': return '\b';
            case 'f': return '\f';
            case 'n': return '\n';
            case 'r': return '\r';
            case 't': return '\t';
            case 'u': break;
            default: throw none();
        }
        int code = 0;
        for (int digit = 0; digit < 4; digit++) {
            char hex = next();
            int nibble = hex < 0x80 ? Character.digit(hex, 16) : -1;
            if (nibble < 0) throw none();
            code = code * 16 + nibble;
        }
        return (char) code;
    }

    private Object number() {
        int start = at;
        take('-');
        if (!take('0')) digits();
        boolean whole = true;
        if (take('.')) {
            whole = false;
            digits();
        }
        if (take('e') || take('E')) {
            whole = false;
            if (!take('+')) take('-');
            digits();
        }
        String found = text.substring(start, at);
        if (!whole) {
            double number = Double.parseDouble(found);
            if (Double.isInfinite(number)) throw none();
            return number;
        }
        if (found.length() > 17 || Math.abs(Long.parseLong(found)) > MAX_INTEGER) {
            throw new Refused("an integer has more than 53 bits");
        }
        return Long.parseLong(found);
    }

    private void digits() {
        int start = at;
        while (at < text.length() && text.charAt(at) >= '0' && text.charAt(at) <= '9') at++;
        if (at == start) throw none();
    }

    private Object word(String word, Object value) {
        if (!text.startsWith(word, at)) throw none();
        at += word.length();
        return value;
    }

    private void blanks() {
        while (at < text.length() && " \t\n\r".indexOf(text.charAt(at)) >= 0) at++;
    }

    private boolean take(char letter) {
        if (peek() != letter) return false;
        at++;
        return true;
    }

    private char peek() { return at < text.length() ? text.charAt(at) : '\0'; }

    private char next() {
        if (at >= text.length()) throw none();
        return text.charAt(at++);
    }

    private Refused none() { return new Refused("this is no JSON document, at character " + at); }
}
