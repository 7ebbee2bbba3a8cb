package org.sealwright.edge;

import java.time.Instant;
import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.Objects;

/** The EARs of several brokers over one guest: whether they are enough, and whether its place stands in the charter. */
final class Ears {
    private static final String[] SAME = {"measurement", "host_data", "report_id", "chip_id"};
    private static final int CHIP_DIGITS = 128;

    private Ears() {}

    /** The EARs that hold: of as many brokers as the charter asks for, all about one guest. Raises Refused. */
    static List<Ear> verify(List<String> tokens, Charter charter, Instant at) {
        Map<String, Ear> held = new LinkedHashMap<>();
        List<String> failed = new ArrayList<>();
        List<String> reasons = new ArrayList<>();
        for (String token : tokens) {
            try {
                Ear ear = verify(token, charter, at);
                if (held.put(ear.broker, ear) != null) reasons.add("two EARs are broker " + ear.broker + "'s");
            } catch (Refused error) {
                failed.addAll(error.reasons());
            }
        }
        List<Ear> found = new ArrayList<>(held.values());
        for (Ear ear : found) reasons.addAll(differences(found.get(0), ear));
        long needed = charter.consortium.brokerThreshold;
        if (found.size() < needed) {
            reasons.addAll(failed);
            if (needed > 1 || failed.isEmpty()) {
                reasons.add(found.size() + " of the " + needed + " EARs that are needed hold, each of another broker");
            }
        }
        if (!reasons.isEmpty()) throw new Refused(reasons);
        return found;
    }

    private static Ear verify(String token, Charter charter, Instant at) {
        String signer = Jws.signer(token, Ear.TYPE);
        byte[] key = charter.consortium.brokers.get(signer);
        if (key == null) throw new Refused("the EAR is signed by '" + signer + "', no broker of this charter");
        Map<String, Object> payload;
        try {
            payload = Jws.read(token, key, Ear.TYPE);
        } catch (Refused error) {
            throw new Refused("the EAR's signature is not broker " + signer + "'s");
        }
        Ear ear = new Ear(new Fields(payload, "EAR"));
        List<String> reasons = ear.reasons(signer, charter, at);
        if (!reasons.isEmpty()) throw new Refused(reasons);
        return ear;
    }

    private static List<String> differences(Ear first, Ear other) {
        List<String> reasons = new ArrayList<>();
        String two = "the EARs of " + first.broker + " and " + other.broker + " are about ";
        if (!first.keys.equals(other.keys)) reasons.add(two + "different keys");
        if (!first.subject.equals(other.subject)) reasons.add(two + "different places");
        for (String claim : SAME) {
            if (!Objects.equals(first.claims.get(claim), other.claims.get(claim))) {
                reasons.add(two + "guests with different " + claim);
            }
        }
        return reasons;
    }

    /** Why the place that {@code ear} names does not stand in the charter; empty if it does. */
    static List<String> placeReasons(Ear ear, Charter charter) {
        List<String> reasons = new ArrayList<>();
        String place = ear.place();
        Charter.Enrolment enrolment = charter.enrolments.get(place);
        if (enrolment == null) {
            reasons.add(place + " is not enrolled in charter version " + charter.version);
            return reasons;
        }
        if (!enrolment.member.equals(ear.member)) {
            reasons.add(place + " is " + enrolment.member + "'s place, not " + ear.member + "'s");
        }
        if (!enrolment.initData.equals(ear.claims.get("host_data"))) {
            reasons.add(place + " is enrolled with other init-data");
        }
        if (enrolment.chips != null && enrolment.chips.stream().noneMatch(
                chip -> whole(chip).equals(whole(String.valueOf(ear.claims.get("chip_id")))))) {
            reasons.add(place + " is not enrolled on this chip");
        }
        Charter.Image image = charter.imagesByMeasurement.get(String.valueOf(ear.claims.get("measurement")));
        if (image == null) {
            reasons.add("the measurement of " + place + " is no approved image's");
            return reasons;
        }
        if (!image.name.equals(enrolment.image) || !image.name.equals(ear.image)) {
            reasons.add(place + " is enrolled with the image " + enrolment.image + ", it runs " + image.name);
        }
        if (!image.roles.contains(ear.role)) {
            reasons.add("the image " + image.name + " is not approved for the role " + ear.role);
        }
        return reasons;
    }

    /** A chip id as 64 bytes in hex: Turin's has 8, padded with zeros in a report. */
    private static String whole(String chip) {
        StringBuilder found = new StringBuilder(chip);
        while (found.length() < CHIP_DIGITS) found.append('0');
        return found.toString();
    }
}
