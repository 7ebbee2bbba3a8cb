import Foundation

/// The EARs of several brokers over one guest: whether they are enough, and whether its place stands in the charter.
enum Ears {
    private static let same = ["measurement", "host_data", "report_id", "chip_id"]
    private static let chipDigits = 128

    /// The EARs that hold: of as many brokers as the charter asks for, all about one guest. Throws Refused.
    static func verify(_ tokens: [String], _ charter: Charter, _ at: Date) throws -> [Ear] {
        var held: [Ear] = []
        var failed: [String] = []
        var reasons: [String] = []
        for token in tokens {
            do {
                let ear = try verify(token, charter, at)
                if let place = held.firstIndex(where: { $0.broker == ear.broker }) {
                    reasons.append("two EARs are broker \(ear.broker)'s")
                    held[place] = ear
                } else {
                    held.append(ear)
                }
            } catch let error as Refused {
                failed += error.reasons
            }
        }
        for ear in held.dropFirst() { reasons += differences(held[0], ear) }
        let needed = charter.consortium.brokerThreshold
        if held.count < needed {
            reasons += failed
            if needed > 1 || failed.isEmpty {
                reasons.append("\(held.count) of the \(needed) EARs that are needed hold, each of another broker")
            }
        }
        guard reasons.isEmpty else { throw Refused(reasons) }
        return held
    }

    private static func verify(_ token: String, _ charter: Charter, _ at: Date) throws -> Ear {
        let signer = try Jws.signer(token, type: Ear.type)
        guard let key = charter.consortium.brokers[signer] else {
            throw Refused("the EAR is signed by '\(signer)', no broker of this charter")
        }
        guard let payload = try? Jws.read(token, key: key, type: Ear.type) else {
            throw Refused("the EAR's signature is not broker \(signer)'s")
        }
        let ear = try Ear(Fields(payload, "EAR"))
        let reasons = ear.reasons(signer: signer, charter, at)
        guard reasons.isEmpty else { throw Refused(reasons) }
        return ear
    }

    private static func differences(_ first: Ear, _ other: Ear) -> [String] {
        let two = "the EARs of \(first.broker) and \(other.broker) are about"
        var reasons: [String] = []
        if first.keys != other.keys { reasons.append("\(two) different keys") }
        if first.subject != other.subject { reasons.append("\(two) different places") }
        for claim in same where first.claims[claim] != other.claims[claim] {
            reasons.append("\(two) guests with different \(claim)")
        }
        return reasons
    }

    /// Why the place that `ear` names does not stand in the charter; empty if it does.
    static func placeReasons(_ ear: Ear, _ charter: Charter) -> [String] {
        let place = ear.place
        guard let enrolment = charter.enrolments[place] else {
            return ["\(place) is not enrolled in charter version \(charter.version)"]
        }
        var reasons: [String] = []
        if enrolment.member != ear.member {
            reasons.append("\(place) is \(enrolment.member)'s place, not \(ear.member)'s")
        }
        if .string(enrolment.initData) != ear.claims["host_data"] {
            reasons.append("\(place) is enrolled with other init-data")
        }
        if let chips = enrolment.chips, !chips.map(whole).contains(whole(text(ear.claims["chip_id"]))) {
            reasons.append("\(place) is not enrolled on this chip")
        }
        guard let image = charter.imagesByMeasurement[text(ear.claims["measurement"])] else {
            return reasons + ["the measurement of \(place) is no approved image's"]
        }
        if image.name != enrolment.image || image.name != ear.image {
            reasons.append("\(place) is enrolled with the image \(enrolment.image), it runs \(image.name)")
        }
        if !image.roles.contains(ear.role) {
            reasons.append("the image \(image.name) is not approved for the role \(ear.role)")
        }
        return reasons
    }

    private static func text(_ value: Json?) -> String {
        if case .string(let text)? = value { return text }
        return ""
    }

    /// A chip id as 64 bytes in hex: Turin's has 8, padded with zeros in a report.
    private static func whole(_ chip: String) -> String {
        chip + String(repeating: "0", count: max(0, chipDigits - chip.utf8.count))
    }
}
