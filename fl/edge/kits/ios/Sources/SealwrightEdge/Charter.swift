import Foundation

/// What a charter says that a device needs, verified from its first root at one moment: TUF's client workflow over the
/// roots, timestamp, snapshot, targets, and the roles of images, enrolments and code. The other roles' files grant a
/// device nothing, and are not read.
public struct Charter {
    static let maxFile = 1 << 20
    private static let maxStore = 16 << 20
    private static let maxFiles = 8192
    private static let maxRoots: Int64 = 1024
    private static let pinned = "sealwright-signed-sha256"
    private static let roles = ["images", "enrolments", "code"]
    private static let guests = ["broker", "server", "site", "inner", "gateway"]

    /// A guest's place.
    struct Enrolment {
        let member: String
        let image: String
        let initData: String
        let chips: [String]?

        init(_ fields: Fields, role: String, name: String) throws {
            _ = try fields.text("role", .oneOf(role))
            _ = try fields.text("name", .oneOf(name))
            member = try fields.text("member", .name)
            image = try fields.text("image", .name)
            initData = try fields.text("init_data_sha256", .hex(64))
            chips = fields.has("chips") ? try fields.texts("chips", .upTo(128), most: 4096) : nil
        }
    }

    /// An approved image.
    struct Image {
        let name: String
        let roles: [String]
    }

    /// A task that devices may run.
    struct Approval {
        let job: String
        let expires: Date

        init(_ fields: Fields, digest: String) throws {
            _ = try fields.text("task", .oneOf(digest))
            job = try fields.text("job", .job)
            expires = try Times.read(fields.text("expires", .any))
        }
    }

    public let id: String
    public private(set) var version: Int64 = 0
    public private(set) var expires = Date.distantFuture
    let consortium: Consortium
    private(set) var enrolments: [String: Enrolment] = [:]
    private(set) var imagesByMeasurement: [String: Image] = [:]
    private(set) var tasks: [String: Approval] = [:]
    private var read: [String: Metadata] = [:]

    /// Verify `store` from the first `root` at `at`; `known`: one seen before. Throws Refused.
    init(_ store: [String: Bytes], root: Bytes, at: Date, known: Charter?) throws {
        try Self.mustBeBounded(store)
        id = crypto.sha256(root).hex
        let (newest, found) = try Self.roots(store, root)
        consortium = found
        read["root"] = newest
        let timestamp = try Metadata("timestamp", store["metadata/timestamp.json"], type: "timestamp")
        try timestamp.mustBeSigned(by: consortium.brokerKeys, consortium.brokerThreshold)
        try timestamp.mustHaveNoOthers(than: consortium.brokerKeys)
        read["timestamp"] = timestamp
        let meta = try timestamp.signed.fields("meta").fields("snapshot.json")
        let number = try meta.integer("version", 1...Int64(Int32.max))
        let file = "metadata/\(number).snapshot.json"
        _ = try Self.mustBe(store, file, meta)
        let snapshot = try byMembers("snapshot", store, file, type: "snapshot")
        try snapshot.mustBeVersion(number)
        version = number
        let listed = try snapshot.signed.fields("meta")
        _ = try role("targets", store, listed)
        for name in Self.roles { try files(of: name, store, role(name, store, listed)) }
        for one in read.values {
            try one.mustHold(at)
            expires = min(expires, one.expires)
        }
        if let known { try mustFollow(known) }
    }

    /// Follow the roots from the first one: the newest, and its consortium.
    private static func roots(_ store: [String: Bytes], _ root: Bytes) throws -> (Metadata, Consortium) {
        guard store["metadata/1.root.json"] == root else {
            throw Refused("metadata/1.root.json: not the root that you trust")
        }
        var newest: (Metadata, Consortium)?
        for number in 1...maxRoots {
            let name = "metadata/\(number).root.json"
            guard let raw = store[name] else { break }
            let metadata = try Metadata(name, raw, type: "root")
            try metadata.mustBeVersion(number)
            let next = try Consortium(metadata.signed.fields("sealwright"))
            try metadata.mustBeSigned(by: next.memberKeys, next.threshold(for: "root"))
            var keys = next.memberKeys
            if let (_, current) = newest {
                try metadata.mustBeSigned(by: current.memberKeys, current.threshold(for: "root"))
                keys.merge(current.memberKeys) { new, _ in new }
                guard next.platform == current.platform, next.trustDomain == current.trustDomain else {
                    throw Refused("\(name): changes the platform or the trust domain")
                }
            }
            try metadata.mustHaveNoOthers(than: keys)
            newest = (metadata, next)
        }
        return newest!
    }

    /// The metadata of a role that the snapshot lists.
    private mutating func role(_ role: String, _ store: [String: Bytes], _ listed: Fields) throws -> Metadata {
        let entry = try listed.fields("\(role).json")
        let number = try entry.integer("version", 1...Int64(Int32.max))
        let metadata = try byMembers(role, store, "metadata/\(number).\(role).json", type: "targets")
        try metadata.mustBeVersion(number)
        guard try entry.text(Self.pinned, .hex(64)) == metadata.digest else {
            throw Refused("\(role): not the one that the snapshot names")
        }
        return metadata
    }

    private mutating func byMembers(
        _ role: String, _ store: [String: Bytes], _ file: String, type: String
    ) throws -> Metadata {
        let metadata = try Metadata(file, store[file], type: type)
        try metadata.mustBeSigned(by: consortium.memberKeys, consortium.threshold(for: role))
        try metadata.mustHaveNoOthers(than: consortium.memberKeys)
        read[role] = metadata
        return metadata
    }

    private mutating func files(of role: String, _ store: [String: Bytes], _ metadata: Metadata) throws {
        let targets = try metadata.signed.fields("targets")
        for path in targets.values.keys {
            var parts = path.split(separator: "/", omittingEmptySubsequences: false).map(String.init)
            guard parts.count > 1, parts[0] == role else {
                throw Refused("\(path): not for the role \(role) to decide")
            }
            let target = try targets.fields(path)
            let digest = try target.fields("hashes").text("sha256", .hex(64))
            let name = parts.removeLast()
            let file = "targets/" + (parts + ["\(digest).\(name)"]).joined(separator: "/")
            try document(parts, name, Self.mustBe(store, file, target))
        }
    }

    private mutating func document(_ folders: [String], _ file: String, _ raw: Bytes) throws {
        guard file.hasSuffix(".json") else { return }
        let name = String(file.dropLast(5))
        if folders == ["images"] {
            try image(Fields(Json.readCanonical(raw, limit: Self.maxFile), file), name)
        } else if folders.count == 2, Self.guests.contains(folders[1]) {
            let fields = Fields(try Json.readCanonical(raw, limit: Self.maxFile), file)
            enrolments["\(folders[1])/\(name)"] = try Enrolment(fields, role: folders[1], name: name)
        } else if folders == ["code"], name.hasPrefix("device-") {
            let digest = String(name.dropFirst(7))
            tasks[digest] = try Approval(Fields(Json.readCanonical(raw, limit: Self.maxFile), file), digest: digest)
        }
    }

    private mutating func image(_ fields: Fields, _ name: String) throws {
        _ = try fields.text("name", .oneOf(name))
        _ = try fields.text("platform", .oneOf(consortium.platform))
        let image = Image(name: name, roles: try fields.texts("roles", .name, most: 5))
        for one in try fields.objects("measurements", most: 1024) {
            let before = imagesByMeasurement.updateValue(image, forKey: try one.text("measurement", .hex(96)))
            guard before == nil || before?.name == name else { throw Refused("two images claim the same measurement") }
        }
    }

    /// No step back, no second content of one version. The timestamp's floor goes when a key did.
    private func mustFollow(_ known: Charter) throws {
        guard known.id == id else { throw Refused("this is another charter") }
        let sameKeys = Set(known.consortium.memberKeys.keys) == Set(consortium.memberKeys.keys)
            && Set(known.consortium.brokerKeys.keys) == Set(consortium.brokerKeys.keys)
        for (role, before) in known.read {
            let now = read[role]!
            if role == "timestamp" {
                guard !sameKeys || now.version >= before.version else { throw Refused("timestamp: older than known") }
            } else if now.version < before.version || (now.version == before.version && now.digest != before.digest) {
                throw Refused("\(role): older than what is known, or other content of the same version")
            }
        }
    }

    private static func mustBe(_ store: [String: Bytes], _ file: String, _ named: Fields) throws -> Bytes {
        guard let raw = store[file] else { throw Refused("\(file): missing") }
        let digest = try named.fields("hashes").text("sha256", .hex(64))
        guard try named.integer("length", 0...Int64(maxFile)) == raw.count, crypto.sha256(raw).hex == digest else {
            throw Refused("\(file): not the bytes that are listed")
        }
        return raw
    }

    private static func mustBeBounded(_ store: [String: Bytes]) throws {
        let sizes = store.values.map(\.count)
        guard sizes.count <= maxFiles, sizes.allSatisfy({ $0 <= maxFile }), sizes.reduce(0, +) <= maxStore else {
            throw Refused("the charter is too large")
        }
    }
}
