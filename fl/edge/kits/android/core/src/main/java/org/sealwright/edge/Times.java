package org.sealwright.edge;

import java.time.Instant;
import java.time.format.DateTimeParseException;

/** Times as documents write them: RFC 3339 in UTC, whole seconds, with Z. */
final class Times {
    private Times() {}

    static Instant read(String text) {
        try {
            if (text.matches("\\d{4}-\\d\\d-\\d\\dT\\d\\d:\\d\\d:\\d\\dZ")) return Instant.parse(text);
        } catch (DateTimeParseException error) {
            throw new Refused("'" + text + "' is no time");
        }
        throw new Refused("this is no time");
    }
}
