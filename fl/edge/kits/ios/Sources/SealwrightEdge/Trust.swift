import Foundation

/// An attested gateway, and the group key to which messages are sealed. `until`: when its EARs end.
public struct GatewayProof {
    public let name: String
    public let until: Date
    let groupKey: Bytes
}

/// What a device believes: the charter that verifies itself from a pinned root, and the gateway that it admits.
public final class Trust {
    private static let maxCharter = 32 << 20
    private static let maxIntroduction = 128 << 10
    private static let maxEars = 16
    private static let proofType = "sealwright-gateway-proof+jwt"

    /// The charter's id: the SHA-256 of its first root.
    public let id: String
    private let root: Bytes
    private let production: Bool
    private var charter: Charter?

    /// `root`: the charter's first root, all that an app carries; in `production` a virtual one is refused.
    public init(root: Bytes, production: Bool = true) {
        self.root = root
        self.production = production
        id = crypto.sha256(root).hex
    }

    /// The newest version of the charter that the device has seen; nil: none yet.
    public var version: Int64? { charter?.version }

    private func charter(_ at: Date) throws -> Charter {
        guard let charter, at < charter.expires else { throw Refused("the device has no charter that holds now") }
        return charter
    }

    /// Take the charter in the answer to `GET charter`, never an older one than before. Throws Refused.
    public func follow(_ raw: Bytes, at: Date) throws {
        let files = try Fields(Json.read(raw, limit: Self.maxCharter), "charter").fields("files")
        var store: [String: Bytes] = [:]
        for name in files.values.keys { store[name] = try Bytes.fromBase64(files.text(name, .any)) }
        let found = try Charter(store, root: root, at: at, known: charter)
        if production, found.consortium.platform == "virtual" {
            throw Refused("the charter is for the virtual platform, which keeps nothing from its host")
        }
        charter = found
    }

    /// The gateway that answered `POST proof` over our nonce. Throws Refused with every reason.
    public func appraise(_ raw: Bytes, nonce: String, at: Date) throws -> GatewayProof {
        let known = try charter(at)
        guard let (token, der, tokens, key) = try? Self.introduction(raw) else {
            throw Refused("its introduction is malformed")
        }
        let ears = try Ears.verify(tokens, known, at)
        let ear = ears[0]
        var reasons = Ears.placeReasons(ear, known)
        if ear.role != "gateway" { reasons.append("its EARs are those of \(ear.place)") }
        if ear.keys["sign"] != .string(crypto.sha256(der).hex) {
            reasons.append("its key is not the one that its EARs name")
        }
        guard reasons.isEmpty else { throw Refused(reasons) }
        let word: [String: Json]
        do {
            word = try Jws.read(token, key: key, type: Self.proofType)
        } catch let error as Refused {
            throw Refused("its word is not its own: " + error.reasons[0])
        }
        return try proof(ears, word, nonce)
    }

    /// The word, the signing key in DER, the EARs, and the raw signing key.
    private static func introduction(_ raw: Bytes) throws -> (String, Bytes, [String], Bytes) {
        let said = Fields(try Json.read(raw, limit: maxIntroduction), "introduction")
        let word = try said.text("word", .upTo(16384))
        let der = try Bytes.fromBase64(said.text("sign_key", .upTo(128)))
        let ears = try said.texts("ears", .upTo(16384), most: maxEars)
        try said.end()
        guard !ears.isEmpty else { throw Refused("it shows no EARs") }
        return (word, der, ears, try Consortium.rawKey(der: der))
    }

    private func proof(_ ears: [Ear], _ word: [String: Json], _ nonce: String) throws -> GatewayProof {
        var reasons: [String] = []
        if word["nonce"] != .string(nonce) { reasons.append("its word is over another nonce") }
        if word["charter"]?["id"] != .string(id) { reasons.append("its word is about another charter") }
        if production, ears.contains(where: { $0.platform == "virtual" }) {
            reasons.append("it runs on the virtual platform")
        }
        var groupKey = Bytes()
        if case .string(let text)? = word["group_key"], let raw = try? Bytes.fromBase64(text) {
            groupKey = raw
        } else {
            reasons.append("its group key is malformed")
        }
        if groupKey.count != hybridPublicSize || word["key_id"] != .string(Sealing.keyId(groupKey).hex) {
            reasons.append("its group key is not the one that it names")
        }
        guard reasons.isEmpty else { throw Refused(reasons) }
        return GatewayProof(name: ears[0].name, until: ears.map(\.expires).min()!, groupKey: groupKey)
    }

    /// Check that the charter approves this task for its job now. Throws Refused.
    public func admit(_ task: DeviceTask, at: Date) throws {
        let digest = try task.ownDigest()
        let approval = try charter(at).tasks[digest]
        var reasons: [String] = []
        if digest != task.digest { reasons.append("its parts do not have the digest that it names") }
        if let approval {
            if approval.job != task.name {
                reasons.append("it is approved for the job \(approval.job), not \(task.name)")
            } else if at >= approval.expires {
                reasons.append("its approval has expired")
            }
        } else {
            reasons.append("the charter approves no device task \(digest)")
        }
        if task.config.keys.contains(where: { $0.hasPrefix("secure_aggregation.") }) {
            reasons.append("its results are summed under masks, which this kit does not do")
        }
        guard reasons.isEmpty else { throw Refused(reasons) }
    }
}
