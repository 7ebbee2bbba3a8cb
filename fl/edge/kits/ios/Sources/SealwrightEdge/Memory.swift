import Foundation

/// Where a device is: job and name but in idle and over, a task in training and reporting.
public struct Standing {
    public var state = DeviceProtocol.State.idle
    public var job: String?
    public var name: String?
    public var task: DeviceTask?
    public var weight = 1.0

    init() {}

    /// Throws Refused for what cannot be gone on with.
    init(_ raw: Bytes) throws {
        let fields = Fields(try Json.readCanonical(raw, limit: Memory.maxState), "standing")
        guard let found = DeviceProtocol.State(rawValue: try fields.text("state", .any)) else {
            throw Refused("the state is none")
        }
        state = found
        job = try fields.textOrNil("job", .job)
        name = try fields.textOrNil("name", .word)
        task = fields.has("task") ? try DeviceTask(fields.fields("task")) : nil
        weight = try fields.number("weight", 1...Double.greatestFiniteMagnitude)
        try fields.end()
        let needsJob = state != .idle && state != .over
        let needsTask = state == .training || state == .reporting
        guard !(needsJob && job == nil), !(needsTask && task == nil) else { throw Refused("the standing is none") }
    }

    func toBytes() throws -> Bytes {
        try CanonicalJson.write(.object([
            "state": .string(state.rawValue), "job": job.map(Json.string) ?? .null,
            "name": name.map(Json.string) ?? .null, "task": task?.words ?? .null, "weight": .number(weight),
        ]))
    }
}

/// What a device remembers over its end, in a folder of its own: one state, the task, the result, the newest blobs.
/// A file is replaced whole or not at all. What is half there or of another version counts as nothing.
struct Memory {
    static let maxState = 1 << 20
    private static let keptBlobs = 4
    private static let state = "state.json"
    private static let result = "result"
    private let folder: URL

    /// `folder` is private to the device: an app's own files on a phone.
    init(_ folder: URL) throws {
        self.folder = folder
        do {
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
        } catch {
            throw Self.unusable
        }
    }

    /// What was kept last; where a device begins if that is nothing, or cannot be gone on with.
    func standing() -> Standing {
        guard let raw = read(Self.state, limit: Self.maxState), let found = try? Standing(raw) else { return Standing() }
        return found.state == .reporting && result() == nil ? Standing() : found
    }

    func keep(_ standing: Standing) throws {
        try write(Self.state, standing.toBytes())
        if standing.state != .reporting { try remove(Self.result) }
    }

    /// The result that no gateway has acknowledged, or nil.
    func result() -> Bytes? { read(Self.result, limit: .max) }

    /// Keep a result; then keep that the device is reporting.
    func keepResult(_ content: Bytes) throws { try write(Self.result, content) }

    /// What is here of a sealed blob.
    func blob(_ blob: Blob) -> Bytes { read(blob.id, limit: Int(blob.size) + Sealing.tagSize) ?? [] }

    /// Keep what has come of a sealed blob, and drop the oldest of the others.
    func keepBlob(_ blob: Blob, _ content: Bytes) throws {
        try write(blob.id, content)
        let keys: [URLResourceKey] = [.contentModificationDateKey]
        let files = (try? FileManager.default.contentsOfDirectory(at: folder, includingPropertiesForKeys: keys)) ?? []
        let others = files.filter { $0.lastPathComponent.utf8.count == 64 && $0.lastPathComponent != blob.id }
        let dated = others.map { ($0, (try? $0.resourceValues(forKeys: Set(keys)).contentModificationDate) ?? .distantPast) }
        for (file, _) in dated.sorted(by: { $0.1 < $1.1 }).dropLast(Self.keptBlobs - 1) {
            try remove(file.lastPathComponent)
        }
    }

    func forgetBlob(_ blob: Blob) throws { try remove(blob.id) }

    private func read(_ name: String, limit: Int) -> Bytes? {
        let file = folder.appendingPathComponent(name)
        guard let size = try? FileManager.default.attributesOfItem(atPath: file.path)[.size] as? Int, size <= limit,
            let data = try? Data(contentsOf: file)
        else { return nil }
        return Bytes(data)
    }

    private func write(_ name: String, _ content: Bytes) throws {
        do {
            try Data(content).write(to: folder.appendingPathComponent(name), options: .atomic)
        } catch {
            throw Self.unusable
        }
    }

    private func remove(_ name: String) throws {
        let file = folder.appendingPathComponent(name)
        guard FileManager.default.fileExists(atPath: file.path) else { return }
        do {
            try FileManager.default.removeItem(at: file)
        } catch {
            throw Self.unusable
        }
    }

    private static var unusable: Refused { Refused("the device's folder cannot be used") }
}
