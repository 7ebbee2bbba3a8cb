import Foundation
@testable import SealwrightEdge

/// The core against the protocol's vectors.
struct VectorTests {
    private let folder: String
    private var checks = 0
    private var failures = 0

    static func run(folder: String, out: String) throws -> Int32 {
        var tests = VectorTests(folder: folder)
        try tests.deviceProtocol()
        try tests.json()
        try tests.messages()
        let request = try tests.sealing()
        try tests.safetensors()
        let deltas = try tests.deltas()
        try tests.trust()
        let made = try CanonicalJson.write(.object(["request": request, "deltas": deltas]))
        try Data(made).write(to: URL(fileURLWithPath: out))
        print("\(tests.checks) checks, \(tests.failures) failed")
        return tests.failures == 0 ? 0 : 1
    }

    private init(folder: String) { self.folder = folder }

    private mutating func deviceProtocol() throws {
        let all = try vectors("protocol")
        let sends = try all.object("sends")
        let states = try all.texts("states", .any, most: 9)
        equal(Set(DeviceProtocol.State.allCases.map(\.rawValue)), Set(states), "states")
        for state in DeviceProtocol.State.allCases {
            equal(state.sends.map { Json.string($0.rawValue) }, sends[state.rawValue], "\(state) sends")
        }
        equal(try all.text("trained", .any), DeviceProtocol.trained.rawValue, "trained")
        equal(try all.text("gave_up", .any), DeviceProtocol.gaveUp.rawValue, "gave up")
        for rule in try all.objects("table", most: 99) {
            let message = DeviceProtocol.Message(rawValue: try rule.text("message", .any))!
            let found = DeviceProtocol.next(message, DeviceProtocol.Status(rawValue: try rule.text("status", .any))!)
            equal(try rule.text("then", .any), found.then.rawValue, "then")
            equal(try rule.bool("waits"), found.waits, "waits")
        }
        let next = try all.fields("next")
        for message in DeviceProtocol.Message.allCases {
            for status in DeviceProtocol.Status.allCases {
                let wanted = try next.object(message.rawValue)[status.rawValue]
                equal(wanted, .string(DeviceProtocol.next(message, status).then.rawValue), "\(message) \(status)")
            }
        }
    }

    private mutating func json() throws {
        let all = try vectors("json")
        for one in try all.objects("texts", most: 999) {
            let raw = try self.raw(one, "raw")
            equal(try one.bool("good"), said { _ = try Json.readCanonical(raw, limit: Answer.maxWords) } == "", raw.hex)
        }
        for one in try all.objects("numbers", most: 999) {
            let number = Double(bitPattern: UInt64(try one.text("bits", .any), radix: 16)!)
            equal(try one.text("text", .any), try CanonicalJson.number(number), "number")
        }
    }

    private mutating func messages() throws {
        let all = try vectors("messages")
        let common = try all.fields("common")
        let request = Request(
            token: try common.text("token", .any), id: try common.text("request", .any),
            answerKey: try common.text("answer_key", .any))
        var task: DeviceTask?
        for one in try all.objects("answers", most: 999) {
            let message = DeviceProtocol.Message(rawValue: try one.text("message", .any))!
            let text = try one.text("text", .any)
            let answer = try? Answer(to: message, Bytes(text))
            equal(try one.bool("good"), answer != nil, text)
            task = task ?? answer?.task
        }
        let kept = try DeviceTask(Fields(Json.read(CanonicalJson.write(task!.words), limit: 1 << 20), "task"))
        equal(kept.words, task!.words, "a task is kept as it was read")
        let made: [String: Request] = [
            "job": request.job(["heart-*", "sleep"], capabilities: ["os": "linux", "cpu": "8"]),
            "task": request.task("job-1", waitSeconds: 2.5),
            "selection": request.selection("job-1", version: 7),
            "result": request.result("job-1", task: task!, weight: 8, encoding: .bf16, compressed: true),
        ]
        for (message, text) in try all.object("requests") {
            equal(text, .string(String(decoding: try made[message]!.toBytes(), as: UTF8.self)), message)
        }
    }

    private mutating func sealing() throws -> Json {
        let all = try vectors("sealing")
        let group = try raw(all, "group_key")
        equal(try all.text("key_id", .any), Sealing.keyId(group).hex, "key id")
        for one in try all.objects("answers", most: 99) {
            let (body, key) = (try raw(one, "body"), try raw(one, "answer_key"))
            let opened = try? Sealing.openAnswer(body, answerKey: key, request: one.text("request", .any))
            equal(try one.textOrNil("words", .any), opened?.hex, "an answer")
        }
        for one in try all.objects("blobs", most: 99) {
            let opened = try? Sealing.openBlob(Blob(one.fields("blob")), raw(one, "sealed"))
            equal(try one.textOrNil("content", .any), opened?.hex, "a blob")
        }
        let request = try all.fields("request")
        let body = try Sealing.sealRequest(
            DeviceProtocol.Message(rawValue: request.text("message", .any))!, words: raw(request, "words"),
            tensors: raw(request, "tensors"), key: testKey(raw(all, "device_key")), groupKey: group,
            charter: all.text("charter", .any))
        check(said { _ = try crypto.seal(body, publicKey: Array(group.dropLast()), info: []) } != "", "a short key")
        return .string(body.hex)
    }

    private mutating func safetensors() throws {
        for one in try vectors("safetensors").objects("files", most: 999) {
            let found = try? Safetensors.floats(raw(one, "raw"))
            guard one.has("floats") else {
                check(found == nil, "a file that is none")
                continue
            }
            let floats = try one.fields("floats")
            equal(Set(floats.values.keys), Set((found ?? [:]).keys), "tensors")
            for (name, tensor) in found ?? [:] {
                let wanted = try floats.fields(name)
                equal(try wanted.text("values", .any), tensor.values.flatMap { Bytes.littleEndian($0.bitPattern) }.hex, name)
                equal(try wanted.list("shape", most: 16), tensor.shape.map(Json.integer), name)
            }
        }
    }

    private mutating func deltas() throws -> Json {
        let all = try vectors("deltas")
        var tensors: [String: Tensor] = [:]
        for one in try all.objects("tensors", most: 99) {
            let shape = try one.list("shape", most: 9).map { size -> Int64 in
                guard case .integer(let count) = size else { throw Refused("a shape is none") }
                return count
            }
            tensors[try one.text("name", .any)] = Tensor(shape: shape, values: numbers(try raw(one, "values")))
        }
        let draws = numbers(try raw(all, "draws"))
        var compressed: [String: Json] = [:]
        for encoding in Deltas.Encoding.allCases {
            for whole in [true, false] {
                var drawing = draws.makeIterator()
                let made = try Deltas.encode(tensors, encoding, draw: { drawing.next()! }, compressed: !whole)
                if whole { equal(try all.fields("encoded").text(encoding.rawValue, .any), made.hex, encoding.rawValue) }
                if !whole { compressed[encoding.rawValue] = .string(made.hex) }
            }
        }
        let bad = ["a": Tensor(shape: [1], values: [.nan])]
        check(said { _ = try Deltas.encode(bad, .f32, draw: { 0 }, compressed: false) } != "", "not finite")
        return .object(compressed)
    }

    private mutating func trust() throws {
        let all = try vectors("trust")
        let roots = try all.fields("roots")
        let stores = try all.fields("stores")
        func answer(_ name: String, _ changed: [String: Json]) throws -> Bytes {
            let files = try stores.object(name).merging(changed) { _, new in new }.filter { $0.value != .null }
            return try CanonicalJson.write(.object(["files": .object(files)]))
        }
        for one in try all.objects("charters", most: 999) {
            let root = Bytes(try roots.text(one.text("root", .any), .any))
            let trust = Trust(root: root, production: try one.bool("production"))
            let at = try Times.read(one.text("at", .any))
            if let known = try one.textOrNil("known", .any) { try trust.follow(answer(known, [:]), at: at) }
            let raw = try answer(one.text("store", .any), one.object("changed"))
            equal(try one.bool("good"), said { try trust.follow(raw, at: at) } == "", "\(one.values)")
            if one.has("version") { equal(one.any("version"), trust.version.map(Json.integer), "the version") }
        }
        let trust = Trust(root: Bytes(try roots.text("hardware", .any)))
        check(said { _ = try trust.appraise([], nonce: "", at: Date()) } != "", "no charter yet")
        for one in try all.objects("proofs", most: 999) {
            let at = try Times.read(one.text("at", .any))
            if trust.version == nil { try trust.follow(answer("hardware-3", [:]), at: at) }
            let (proof, nonce) = (Bytes(try one.text("proof", .any)), try one.text("nonce", .any))
            var until: String?
            let says = said { until = Times.write(try trust.appraise(proof, nonce: nonce, at: at).until) }
            equal(try one.text("says", .any), says, try one.text("name", .any))
            equal(try one.textOrNil("until", .any), until, "until")
        }
        for one in try all.objects("tasks", most: 999) {
            let (task, at) = (try DeviceTask(one.fields("task")), try Times.read(one.text("at", .any)))
            equal(try one.text("says", .any), said { try trust.admit(task, at: at) }, "task")
        }
    }

    // --- what all of them use -----------------------------------------------------------------------------------------

    private func vectors(_ name: String) throws -> Fields {
        let data = try Data(contentsOf: URL(fileURLWithPath: "\(folder)/\(name).json"))
        return Fields(try Json.read(Bytes(data), limit: 64 << 20), name)
    }

    private func raw(_ fields: Fields, _ name: String) throws -> Bytes { try Bytes.fromHex(fields.text(name, .any)) }

    private func numbers(_ raw: Bytes) -> [Float] {
        stride(from: 0, to: raw.count, by: 4).map { Float(bitPattern: raw.number(at: $0, as: UInt32.self)) }
    }

    /// The first reason for which it is refused; "" if it is not.
    private func said(_ work: () throws -> Void) -> String {
        do {
            try work()
            return ""
        } catch let error as Refused {
            return error.reasons[0]
        } catch {
            return "\(error)"
        }
    }

    private mutating func equal<Value: Equatable>(_ wanted: Value, _ found: Value, _ what: String) {
        check(wanted == found, "\(what): wanted \(wanted), found \(found)")
    }

    private mutating func check(_ good: Bool, _ what: @autoclosure () -> String) {
        checks += 1
        if good { return }
        failures += 1
        FileHandle.standardError.write(Data("FAILED: \(what().prefix(400))\n".utf8))
    }
}
