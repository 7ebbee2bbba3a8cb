import Foundation

/// What an app decides. `jobs`: names, or their beginning and `*`, in which it takes part.
public struct DeviceSettings {
    public var jobs: [String]
    public var capabilities: [String: String] = [:]
    public var encoding = Deltas.Encoding.bf16
    public var compressed = false
    /// How long a gateway may hold back the answer to a request for a task.
    public var waitSeconds = 20.0
    /// While it trains, a device asks so often whether its version is still trained.
    public var selectionSeconds = 30.0
    /// What the app applies to every model before training, before what a task's configuration names,
    public var filtersIn: [Filter] = []
    /// and to every difference before it is sent, after what a task's configuration names.
    public var filtersOut: [Filter] = []

    public init(jobs: [String]) { self.jobs = jobs }
}

/// The job loop of a device: what it does next follows from the protocol's table and from nothing else. A device that
/// is killed at any moment goes on from its folder. It sends nothing before a gateway has proved itself to it, and runs
/// nothing that the charter does not approve. For one thread.
public final class Device {
    private static let firstPause = 2.0
    private static let longestPause = 900.0
    private static let uploadFrom = 4 << 20
    private static let proofMargin: TimeInterval = 2

    private let connection: GatewayConnection
    private let trust: Trust
    private let token: String
    private let key: DeviceKey
    private let source: DataSource
    private let components: ComponentResolver
    private let memory: Memory
    private let settings: DeviceSettings
    private let condition: Condition
    private let event: Event
    private let clock: () -> Date
    private var proof: GatewayProof?
    private var failures = 0
    /// Where it is.
    public private(set) var standing: Standing

    /// `token` and `key`: what the consortium's issuer gave this device; `folder`: its own, private.
    public init(
        connection: GatewayConnection, trust: Trust, token: String, key: DeviceKey, source: DataSource,
        components: ComponentResolver, folder: URL, settings: DeviceSettings, condition: @escaping Condition = { nil },
        event: @escaping Event = { _, _ in }, clock: @escaping () -> Date = Date.init
    ) throws {
        self.connection = connection
        self.trust = trust
        self.token = token
        self.key = key
        self.source = source
        self.components = components
        self.settings = settings
        self.condition = condition
        self.event = event
        self.clock = clock
        memory = try Memory(folder)
        standing = memory.standing()
    }

    /// Work until `isStopped` says so, or the device is over.
    public func run(until isStopped: () -> Bool) {
        while !isStopped(), standing.state != .over { Thread.sleep(forTimeInterval: step()) }
    }

    /// Do the next thing; how many seconds to wait before the one after it.
    public func step() -> Double {
        guard let message = standing.state.sends else { return Self.longestPause }
        if let why = condition() {
            event("waiting", ["why": .string(why)])
            return Self.firstPause
        }
        do {
            let seconds = standing.state == .training ? try train() : try say(message)
            if seconds == 0 { failures = 0 }
            return seconds
        } catch is KeyRotated {
            proof = nil
            return pause()
        } catch let error as GatewayUnavailable {
            event("waiting", ["why": .string(error.what)])
            return max(error.seconds, pause())
        } catch {  // the gateway, the charter or an answer does not hold: nothing was sent, or believed
            proof = nil
            refused(error)
            return pause()
        }
    }

    // MARK: messages

    /// Send `message`; go where the table leads.
    private func say(_ message: DeviceProtocol.Message) throws -> Double {
        let answer = try ask(message)
        let rule = DeviceProtocol.next(message, answer.status)
        try go(rule, answer)
        if answer.status == .error { return max(answer.retrySeconds, pause()) }
        failures = 0
        return rule.waits ? max(answer.retrySeconds, 0.1) : 0
    }

    private func go(_ rule: DeviceProtocol.Rule, _ answer: Answer) throws {
        let now = standing
        var next = now
        next.state = rule.then
        if rule.then != .training, rule.then != .reporting { next.task = nil }
        if rule.then == .idle || rule.then == .over { (next.job, next.name) = (nil, nil) }
        if rule.message == .task, answer.status == .ok {
            guard let task = answer.task else { throw Refused("the gateway's answer has no task") }
            next.task = task
        }
        if rule.message == .job, answer.status == .ok {
            guard let job = answer.job, let name = answer.name else { throw Refused("the gateway's answer has no job") }
            (next.job, next.name) = (job, name)
        }
        try keep(next)
        guard let heard = Self.heard(rule, answer.status == .ok) else { return }
        var details: [String: Json] = [
            "status": .string(answer.status.rawValue), "message": .string(answer.message),
            "job": (next.job ?? now.job).map(Json.string) ?? .null,
        ]
        if let task = next.task { details["version"] = .integer(task.version) }
        event(heard, details)
    }

    /// What an app hears of an answer; nil: nothing.
    private static func heard(_ rule: DeviceProtocol.Rule, _ ok: Bool) -> String? {
        switch rule.message {
        case .job: return rule.then == .joined ? "joined" : rule.then == .over ? "over" : "waiting"
        case .result: return ok ? "reported" : rule.then == .reporting ? "waiting" : "dropped"
        case .mask: return nil
        case .task: return rule.then == .training ? "task" : rule.then == .over ? "over" : nil
        case .selection: return nil
        }
    }

    private func keep(_ next: Standing) throws {
        try memory.keep(next)
        standing = next
    }

    private func ask(_ message: DeviceProtocol.Message) throws -> Answer {
        let request = try self.request(message)
        var tensors = Bytes()
        if message == .result {
            guard let result = memory.result() else { throw Refused("the result is gone from the device's folder") }
            tensors = result
        }
        let groupKey = try gateway().groupKey
        let sealed = try Sealing.sealRequest(
            message, words: request.toBytes(), tensors: tensors, key: key, groupKey: groupKey, charter: trust.id)
        let body = message == .result && sealed.count >= Self.uploadFrom
            ? try connection.upload(sealed, ticket: standing.task!.ticket)
            : try connection.send(message, sealed)
        let words = try Sealing.openAnswer(body, answerKey: Bytes.fromHex(request.answerKey), request: request.id)
        return try Answer(to: message, words)
    }

    private func request(_ message: DeviceProtocol.Message) throws -> Request {
        let request = Request.fresh(token: token)
        switch (message, standing.job, standing.task) {
        case (.job, _, _):
            return request.job(settings.jobs, capabilities: settings.capabilities)
        case (.task, let job?, _):
            return request.task(job, waitSeconds: settings.waitSeconds)
        case (.selection, let job?, let task?):
            return request.selection(job, version: task.version)
        case (.result, let job?, let task?):
            return request.result(
                job, task: task, weight: standing.weight, encoding: settings.encoding, compressed: settings.compressed)
        default:
            throw Refused("the device has no job, or no task")
        }
    }

    /// A gateway that has proved itself, and whose EARs have not ended.
    private func gateway() throws -> GatewayProof {
        let at = clock()
        if let proof, at < proof.until - Self.proofMargin { return proof }
        proof = nil
        if let charter = try connection.charter(above: trust.version) { try trust.follow(charter, at: at) }
        let nonce = crypto.random(16).hex
        let found = try trust.appraise(connection.proof(nonce), nonce: nonce, at: clock())
        proof = found
        return found
    }

    /// How long to wait after a failure: twice as long after each, and never the same for all devices.
    private func pause() -> Double {
        failures = min(failures + 1, 20)
        let doubled = Self.firstPause * Double(1 << (failures - 1))
        return min(doubled, Self.longestPause) * Double.random(in: 0.5..<1.5)
    }

    // MARK: training

    private func train() throws -> Double {
        let task = standing.task!
        _ = try gateway()  // a device that was restarted has no charter yet that could approve its task
        let encoded: Bytes
        let examples: Int
        do {
            (encoded, examples) = try trained(task)
        } catch let error as GatewayUnavailable {
            throw error
        } catch let stopped as TrainingStopped {
            event("dropped", ["why": .string(stopped.why), "version": .integer(task.version)])
            if standing.state == .training { try giveUp() }
            return pause()
        } catch {  // this task will not come right by trying it again
            refused(error)
            try giveUp()
            return pause()
        }
        try memory.keepResult(encoded)
        var next = standing
        (next.state, next.weight) = (DeviceProtocol.trained, Double(max(1, examples)))
        try keep(next)
        event("trained", ["version": .integer(task.version), "bytes": .integer(Int64(encoded.count))])
        return 0
    }

    /// The encoded difference, and the number of examples that it counts for.
    private func trained(_ task: DeviceTask) throws -> (Bytes, Int) {
        guard task.name == standing.name else { throw Refused("the task is for another job") }
        try trust.admit(task, at: clock())
        let trainer = try components.trainer(of: task)
        let filtersIn = settings.filtersIn + (try components.filters(of: task, "filters_in"))
        let filtersOut = try components.filters(of: task, "filters_out") + settings.filtersOut
        let graph = try content(task.graph)
        var model = try Safetensors.floats(content(task.model))
        guard model.values.allSatisfy({ $0.values.allSatisfy(\.isFinite) }) else { throw Refused("the model is not finite") }
        for filter in filtersIn { model = try filter(model) }
        let dataset = try source.dataset(job: task.name, config: task.config)
        let after = try trainer.train(
            graph: graph, params: TrainingParams(task.config), model: model, dataset: dataset, goOn: goOn())
        var delta: [String: Tensor] = [:]
        for (name, before) in model {
            let values = after[name]?.values ?? before.values
            guard values.count == before.values.count else { throw Refused("a trained tensor has another shape") }
            delta[name] = Tensor(shape: before.shape, values: zip(values, before.values).map { $0 - $1 })
        }
        for filter in filtersOut { delta = try filter(delta) }
        let encoded = try Deltas.encode(
            delta, settings.encoding, draw: { Float.random(in: 0..<1) }, compressed: settings.compressed)
        return (encoded, dataset.count)
    }

    private func giveUp() throws {
        var next = standing
        (next.state, next.task) = (DeviceProtocol.gaveUp, nil)
        try keep(next)
    }

    /// A blob's content, fetched from where its fetching broke off.
    private func content(_ blob: Blob) throws -> Bytes {
        var have = memory.blob(blob)
        while have.count < Int(blob.size) + Sealing.tagSize {
            have = try connection.blob(blob, have: have)
            try memory.keepBlob(blob, have)
        }
        do {
            return try Sealing.openBlob(blob, have)
        } catch {
            try memory.forgetBlob(blob)
            throw error
        }
    }

    /// What a trainer calls before each step: throws TrainingStopped if it is to stop.
    private func goOn() -> () throws -> Void {
        var asked = clock()
        return { [self] in
            if let why = condition() { throw TrainingStopped(why) }
            let at = clock()
            guard at.timeIntervalSince(asked) >= settings.selectionSeconds else { return }
            asked = at
            // What is trained may still count if nobody answers; the result will be told otherwise.
            guard let answer = try? ask(.selection) else { return }
            let rule = DeviceProtocol.next(.selection, answer.status)
            guard rule.then != .training else { return }
            try go(rule, answer)
            throw TrainingStopped("its version is trained no more")
        }
    }

    private func refused(_ error: Error) {
        let reasons = (error as? Refused)?.reasons ?? ["\(type(of: error))"]
        event("refused", ["why": .string(reasons[0]), "reasons": .list(reasons.map(Json.string))])
    }
}
