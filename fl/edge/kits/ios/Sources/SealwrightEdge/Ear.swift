import Foundation

/// A broker's signed word on one guest: its payload, checked by form, and why it does not hold now.
struct Ear {
    static let type = "eat+jwt"
    private static let skew: Int64 = 60
    private static let times: ClosedRange<Int64> = 0...(1 << 40)

    let broker: String
    let platform: String
    let keys: [String: Json]
    let subject: [String: Json]
    let role: String
    let name: String
    let member: String
    let image: String
    /// What the SNP report says.
    let claims: [String: Json]
    private let issued: Int64
    private let ends: Int64
    private let charter: String
    private let charterVersion: Int64
    private let statuses: [String: String]

    init(_ fields: Fields) throws {
        _ = try fields.text("eat_profile", .oneOf("urn:sealwright:ear:1"))
        issued = try fields.integer("iat", Self.times)
        ends = try fields.integer("exp", Self.times)
        broker = try fields.text("iss", .name)
        _ = try fields.text("nonce", .upTo(128))
        let about = try fields.fields("charter")
        charter = try about.text("id", .hex(64))
        charterVersion = try about.integer("version", 1...Json.maxInteger)
        try about.end()
        platform = try fields.text("platform", .oneOf("virtual", "hardware"))
        subject = try fields.object("subject")
        let place = Fields(subject, "subject")
        role = try place.text("role", .name)
        name = try place.text("name", .name)
        member = try place.text("member", .name)
        image = try place.text("image", .name)
        try place.end()
        keys = try fields.object("keys")
        let digests = Fields(keys, "keys")
        for purpose in keys.keys { _ = try digests.text(purpose, .hex(64)) }
        let modules = try fields.fields("submods")
        var found: [String: String] = [:]
        var evidence: [String: Json]?
        for device in modules.values.keys {
            let module = try modules.fields(device)
            found[device] = try module.text("ear.status", .oneOf("affirming", "warning", "contraindicated", "none"))
            let vector = try module.fields("ear.trustworthiness-vector")
            for claim in vector.values.keys { _ = try vector.integer(claim, -Json.maxInteger...Json.maxInteger) }
            _ = try module.text("ear.appraisal-policy-id", .any)
            let said = try module.object("ear.veraison.annotated-evidence")
            if device == "cpu0" { evidence = said }
            try module.end()
        }
        try fields.end()
        guard let evidence else { throw Refused("the EAR says nothing of cpu0") }
        (claims, statuses) = (evidence, found)
    }

    var expires: Date { Date(timeIntervalSince1970: Double(ends)) }

    var place: String { "\(role)/\(name)" }

    /// Why this EAR (whose signature by `signer` holds) is refused at `at`; empty if it is good.
    func reasons(signer: String, _ known: Charter, _ at: Date) -> [String] {
        var reasons: [String] = []
        let lease = known.consortium.leaseSeconds
        let end = Date(timeIntervalSince1970: Double(min(ends, issued + lease)))
        if broker != signer { reasons.append("the EAR names \(broker) as its issuer, not its signer") }
        if charter != known.id { reasons.append("the EAR is about another charter (\(charter.prefix(16))…)") }
        if platform != known.consortium.platform {
            reasons.append("the EAR is about a \(platform) guest; this charter is \(known.consortium.platform)")
        }
        if at < Date(timeIntervalSince1970: Double(issued - Self.skew)) { reasons.append("the EAR is from the future") }
        if at >= end { reasons.append("the EAR ended at \(Times.write(end)) (broker \(broker))") }
        if ends - issued > lease, charterVersion >= known.version {
            reasons.append("the EAR lives longer than the charter allows")
        }
        for (device, status) in statuses.sorted(by: { $0.key < $1.key }) where status != "affirming" {
            reasons.append("the appraisal of \(device) is \(status), not affirming")
        }
        return reasons
    }
}
