package org.sealwright.edge;

import java.time.Instant;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.regex.Pattern;

/** A broker's signed word on one guest: its payload, checked by form, and why it does not hold now. */
final class Ear {
    static final String TYPE = "eat+jwt";
    private static final long MAX_TIME = 1L << 40;
    private static final long SKEW_SECONDS = 60;
    private static final Pattern PROFILE = Pattern.compile("urn:sealwright:ear:1");
    private static final Pattern PLATFORM = Pattern.compile("virtual|hardware");
    private static final Pattern STATUS = Pattern.compile("affirming|warning|contraindicated|none");
    private static final Pattern NONCE = Pattern.compile(".{0,128}", Pattern.DOTALL);

    final String broker;
    final String platform;
    final Map<String, Object> keys;
    final Map<String, Object> subject;
    final String role;
    final String name;
    final String member;
    final String image;
    /** What the SNP report says. */
    Map<String, Object> claims;
    private final long issued;
    private final long ends;
    private final String charter;
    private final long charterVersion;
    private final Map<String, String> statuses = new TreeMap<>();

    Ear(Fields fields) {
        fields.text("eat_profile", PROFILE);
        issued = fields.integer("iat", 0, MAX_TIME);
        ends = fields.integer("exp", 0, MAX_TIME);
        broker = fields.text("iss", Fields.NAME);
        fields.text("nonce", NONCE);
        Fields about = fields.fields("charter");
        charter = about.text("id", Fields.HEX32);
        charterVersion = about.integer("version", 1, Json.MAX_INTEGER);
        about.end();
        platform = fields.text("platform", PLATFORM);
        subject = fields.object("subject");
        Fields place = new Fields(subject, "subject");
        role = place.text("role", Fields.NAME);
        name = place.text("name", Fields.NAME);
        member = place.text("member", Fields.NAME);
        image = place.text("image", Fields.NAME);
        place.end();
        keys = fields.object("keys");
        Fields digests = new Fields(keys, "keys");
        for (String purpose : keys.keySet()) digests.text(purpose, Fields.HEX32);
        Fields modules = fields.fields("submods");
        for (String device : modules.values().keySet()) module(device, modules.fields(device));
        fields.end();
        if (claims == null) throw new Refused("the EAR says nothing of cpu0");
    }

    private void module(String device, Fields fields) {
        statuses.put(device, fields.text("ear.status", STATUS));
        Map<String, Object> vector = fields.object("ear.trustworthiness-vector");
        Fields values = new Fields(vector, "vector");
        for (String claim : vector.keySet()) values.integer(claim, -Json.MAX_INTEGER, Json.MAX_INTEGER);
        fields.text("ear.appraisal-policy-id", Fields.ANY);
        Map<String, Object> evidence = fields.object("ear.veraison.annotated-evidence");
        fields.end();
        if (device.equals("cpu0")) claims = evidence;
    }

    Instant expires() { return Instant.ofEpochSecond(ends); }

    String place() { return role + "/" + name; }

    /** Why this EAR (whose signature by {@code signer} holds) is refused at {@code at}; empty if it is good. */
    List<String> reasons(String signer, Charter of, Instant at) {
        List<String> reasons = new ArrayList<>();
        long lease = of.consortium.leaseSeconds;
        Instant end = Instant.ofEpochSecond(Math.min(ends, issued + lease));
        if (!broker.equals(signer)) reasons.add("the EAR names " + broker + " as its issuer, not its signer");
        if (!charter.equals(of.id)) {
            reasons.add("the EAR is about another charter (" + charter.substring(0, 16) + "…)");
        }
        if (!platform.equals(of.consortium.platform)) {
            reasons.add("the EAR is about a " + platform + " guest; this charter is " + of.consortium.platform);
        }
        if (at.isBefore(Instant.ofEpochSecond(issued - SKEW_SECONDS))) reasons.add("the EAR is from the future");
        if (!at.isBefore(end)) reasons.add("the EAR ended at " + end + " (broker " + broker + ")");
        if (ends - issued > lease && charterVersion >= of.version) {
            reasons.add("the EAR lives longer than the charter allows");
        }
        for (Map.Entry<String, String> one : statuses.entrySet()) {
            if (!one.getValue().equals("affirming")) {
                reasons.add("the appraisal of " + one.getKey() + " is " + one.getValue() + ", not affirming");
            }
        }
        return reasons;
    }
}
