/// The words of a request: the device's token, a random id, the key under which it is answered, and what is asked.
public struct Request {
    public let id: String
    public let answerKey: String
    private var words: [String: Json]

    public init(token: String, id: String, answerKey: String) {
        self.id = id
        self.answerKey = answerKey
        words = ["token": .string(token), "request": .string(id), "answer_key": .string(answerKey)]
    }

    /// A request with a fresh id and key.
    static func fresh(token: String) -> Request {
        Request(token: token, id: crypto.random(16).hex, answerKey: crypto.random(32).hex)
    }

    private func with(_ more: [String: Json]) -> Request {
        var found = self
        found.words.merge(more) { _, new in new }
        return found
    }

    public func job(_ jobs: [String], capabilities: [String: String]) -> Request {
        with(["jobs": .list(jobs.map(Json.string)), "capabilities": .object(capabilities.mapValues(Json.string))])
    }

    public func task(_ job: String, waitSeconds: Double) -> Request {
        with(["job": .string(job), "wait_seconds": .number(waitSeconds)])
    }

    public func selection(_ job: String, version: Int64) -> Request {
        with(["job": .string(job), "version": .integer(version)])
    }

    public func result(
        _ job: String, task: DeviceTask, weight: Double, encoding: Deltas.Encoding, compressed: Bool
    ) -> Request {
        with([
            "job": .string(job), "version": .integer(task.version), "task": .string(task.digest),
            "weight": .number(weight), "encoding": .string(encoding.rawValue), "compressed": .bool(compressed),
            "cookie": .string(task.cookie),
        ])
    }

    public func toBytes() throws -> Bytes { try CanonicalJson.write(.object(words)) }
}
