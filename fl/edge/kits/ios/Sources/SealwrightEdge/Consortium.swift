/// Who belongs to a charter: the field `sealwright` of its root. Which keys sign which role follows from it alone, so
/// that the metadata's own lists of keys, roles and delegations are never asked.
struct Consortium {
    private static let keyPrefix: Bytes = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00]

    let platform: String
    let trustDomain: String
    let brokerThreshold: Int64
    let leaseSeconds: Int64
    /// Brokers' raw Ed25519 keys, by name.
    let brokers: [String: Bytes]
    /// Raw Ed25519 keys by TUF key id.
    let memberKeys: [String: Bytes]
    let brokerKeys: [String: Bytes]
    private let threshold: Int64
    private let thresholds: [String: Int64]

    init(_ fields: Fields) throws {
        platform = try fields.text("platform", .oneOf("virtual", "hardware"))
        trustDomain = try fields.text("trust_domain", .word)
        let members = try fields.objects("members", most: 64).map { try Self.rawKey(pem: $0.text("public_key", .any)) }
        let named = try fields.objects("brokers", most: 16).map {
            (try $0.text("name", .name), try Self.rawKey(pem: $0.text("signing_key", .any)))
        }
        let all = Set(members).union(named.map(\.1))
        guard !members.isEmpty, !named.isEmpty, all.count == members.count + named.count,
            Set(named.map(\.0)).count == named.count
        else { throw Refused("the consortium gives one key to two parties, or has none") }
        brokers = Dictionary(uniqueKeysWithValues: named)
        memberKeys = Dictionary(uniqueKeysWithValues: try members.map { (try Self.keyId($0), $0) })
        brokerKeys = Dictionary(uniqueKeysWithValues: try named.map { (try Self.keyId($0.1), $0.1) })
        let most = Int64(members.count)
        threshold = try fields.integer("threshold", 1...most)
        let own = fields.isGiven("thresholds") ? try fields.fields("thresholds") : Fields([:], "thresholds")
        thresholds = Dictionary(uniqueKeysWithValues: try own.values.keys.map { ($0, try own.integer($0, 1...most)) })
        brokerThreshold = fields.isGiven("broker_threshold")
            ? try fields.integer("broker_threshold", 1...Int64(named.count)) : 1
        leaseSeconds = fields.isGiven("lease_seconds") ? try fields.integer("lease_seconds", 5...3600) : 60
        guard trustDomain.hasPrefix("virtual.") == (platform == "virtual") else {
            throw Refused("the consortium's platform and trust domain do not fit")
        }
    }

    /// How many members sign this role.
    func threshold(for role: String) -> Int64 { thresholds[role] ?? threshold }

    /// The raw key in the PEM of an Ed25519 key.
    private static func rawKey(pem: String) throws -> Bytes {
        let begin = "-----BEGIN PUBLIC KEY-----\n"
        let end = "\n-----END PUBLIC KEY-----\n"
        guard pem.hasPrefix(begin), pem.hasSuffix(end), pem.count >= begin.count + end.count else {
            throw Refused("a key is not in PEM")
        }
        return try rawKey(der: Bytes.fromBase64(String(pem.dropFirst(begin.count).dropLast(end.count))))
    }

    /// The raw key in the DER (SubjectPublicKeyInfo) of an Ed25519 key.
    static func rawKey(der: Bytes) throws -> Bytes {
        guard der.count == keyPrefix.count + 32, Array(der[..<keyPrefix.count]) == keyPrefix else {
            throw Refused("a key is not Ed25519")
        }
        return Array(der[keyPrefix.count...])
    }

    private static func keyId(_ key: Bytes) throws -> String {
        let said: [String: Json] = [
            "keytype": .string("ed25519"), "keyval": .object(["public": .string(key.hex)]), "scheme": .string("ed25519"),
        ]
        return crypto.sha256(try CanonicalJson.writeForTuf(.object(said))).hex
    }
}
