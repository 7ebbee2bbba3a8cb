/// Something to fetch: `sha256` and `size` are of its content, which `key` opens.
public struct Blob {
    public let id: String
    let key: String
    public let sha256: String
    public let size: Int64

    public init(_ fields: Fields) throws {
        id = try fields.text("id", .hex(64))
        key = try fields.text("key", .hex(64))
        sha256 = try fields.text("sha256", .hex(64))
        size = try fields.integer("size", 1...((1 << 40) - 1))
        try fields.end()
    }

    var words: Json {
        .object(["id": .string(id), "key": .string(key), "sha256": .string(sha256), "size": .integer(size)])
    }
}

/// What to train, as a gateway names it. The charter approves its digest.
public struct DeviceTask {
    private static let context = Bytes("sealwright-device-task-v1\0")

    public let version: Int64
    public let name: String
    public let digest: String
    public let format: String
    public let config: [String: Json]
    public let graph: Blob
    public let model: Blob
    let cookie: String
    let ticket: String

    public init(_ fields: Fields) throws {
        version = try fields.integer("version", 0...((1 << 31) - 1))
        name = try fields.text("name", .word)
        digest = try fields.text("digest", .hex(64))
        format = try fields.text("format", .oneOf("executorch"))
        config = try fields.object("config")
        graph = try Blob(fields.fields("graph"))
        model = try Blob(fields.fields("model"))
        cookie = try fields.text("cookie", .cookie)
        ticket = try fields.text("ticket", .cookie)
        try fields.end()
    }

    /// The digest that its parts have.
    func ownDigest() throws -> String {
        let said: [String: Json] = [
            "config": .object(config), "format": .string(format), "graph": .string(graph.sha256), "job": .string(name),
        ]
        return crypto.sha256(Self.context + (try CanonicalJson.write(.object(said)))).hex
    }

    public var words: Json {
        .object([
            "version": .integer(version), "name": .string(name), "digest": .string(digest), "format": .string(format),
            "config": .object(config), "graph": graph.words, "model": model.words, "cookie": .string(cookie),
            "ticket": .string(ticket),
        ])
    }
}
