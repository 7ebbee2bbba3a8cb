/// What a gateway answers. What belongs to another message's answer is nil or empty.
public struct Answer {
    /// Bytes of any message's words.
    public static let maxWords = 256 << 10

    public let status: DeviceProtocol.Status
    public let message: String
    public let retrySeconds: Double
    public private(set) var job: String?
    public private(set) var name: String?
    public private(set) var method: String?
    public private(set) var config: [String: Json] = [:]
    public private(set) var task: DeviceTask?
    public private(set) var versions: [Int64] = []

    /// The words of an answer to `message`. Throws Refused for anything but their canonical form.
    public init(to asked: DeviceProtocol.Message, _ raw: Bytes) throws {
        let fields = Fields(try Json.readCanonical(raw, limit: Self.maxWords), asked.rawValue)
        guard let found = DeviceProtocol.Status(rawValue: try fields.text("status", .any)) else {
            throw Refused("the answer's status is none")
        }
        status = found
        message = fields.isGiven("message") ? try fields.text("message", .upTo(500)) : ""
        retrySeconds = fields.isGiven("retry_seconds") ? try fields.number("retry_seconds", 0...86400) : 0
        switch asked {
        case .job:
            job = try fields.textOrNil("job", .job)
            name = try fields.textOrNil("name", .word)
            method = try fields.textOrNil("method", .word)
            if fields.isGiven("config") { config = try fields.object("config") }
        case .task:
            if fields.has("task") { task = try DeviceTask(fields.fields("task")) }
        case .selection:
            guard fields.isGiven("versions") else { break }
            versions = try fields.list("versions", most: 64).map {
                guard case .integer(let version) = $0, 0 <= version, version < 1 << 31 else {
                    throw Refused("a version is none")
                }
                return version
            }
        case .result, .mask:
            break
        }
        try fields.end()
    }
}
