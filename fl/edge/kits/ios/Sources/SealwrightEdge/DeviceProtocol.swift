/// The device protocol's state table; tests hold it against the reference's (docs/reference/device-protocol.md).
public enum DeviceProtocol {
    public enum Message: String, CaseIterable { case job, task, selection, result, mask }

    public enum Status: String, CaseIterable {
        case ok = "OK", retry = "RETRY", noTask = "NO_TASK", noJob = "NO_JOB", done = "DONE", error = "ERROR"
        case invalidRequest = "INVALID_REQUEST"
    }

    /// Where a device is.
    public enum State: String, CaseIterable {
        case idle, joined, training, reporting
        /// Of the table alone: this kit refuses tasks whose results are masked, so that no device of it gets here.
        case masking
        case over

        /// What a device sends in this state; nil: nothing.
        public var sends: Message? {
            switch self {
            case .idle: return .job
            case .joined: return .task
            case .training: return .selection
            case .reporting: return .result
            case .masking: return .mask
            case .over: return nil
            }
        }
    }

    /// An answer leads to `then`; `waits`: the device waits as long as the answer says.
    public struct Rule {
        public let message: Message
        public let then: State
        public let waits: Bool
    }

    /// Where a device goes from `training` when its task has a result,
    public static let trained = State.reporting
    /// and where when it has none.
    public static let gaveUp = State.joined

    private static let rules: [Message: [Status: (State, Bool)]] = [
        .job: [
            .ok: (.joined, false), .retry: (.idle, true), .noJob: (.idle, true), .done: (.over, false),
            .error: (.idle, true), .invalidRequest: (.over, false),
        ],
        .task: [
            .ok: (.training, false), .retry: (.joined, true), .noTask: (.joined, true), .noJob: (.idle, true),
            .done: (.idle, true), .error: (.joined, true), .invalidRequest: (.over, false),
        ],
        .selection: [
            .ok: (.training, false), .noTask: (.joined, false), .noJob: (.idle, true), .done: (.idle, true),
            .error: (.training, true), .invalidRequest: (.joined, false),
        ],
        .result: [
            .ok: (.joined, false), .retry: (.reporting, true), .noTask: (.joined, false), .noJob: (.idle, true),
            .done: (.idle, true), .error: (.reporting, true), .invalidRequest: (.joined, true),
        ],
        .mask: [
            .ok: (.masking, false), .retry: (.masking, true), .noTask: (.joined, false), .noJob: (.idle, true),
            .done: (.idle, true), .error: (.masking, true), .invalidRequest: (.joined, true),
        ],
    ]

    /// The rule of an answer; a status that may not answer `message` counts as `error`.
    public static func next(_ message: Message, _ status: Status) -> Rule {
        let (then, waits) = rules[message]![status] ?? rules[message]![.error]!
        return Rule(message: message, then: then, waits: waits)
    }
}
