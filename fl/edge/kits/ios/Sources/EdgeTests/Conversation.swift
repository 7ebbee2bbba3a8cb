import Foundation
import SealwrightEdge

/// A device that talks with a real gateway. It goes on until it hears the event that the settings name, or for the
/// steps that they allow, and prints each event as a line of JSON.
enum Conversation {
    /// Kept until the process ends: Foundation on Linux may abort while it takes a session down.
    private static var transport: URLSessionTransport?

    static func run(settings file: String, folder: String) throws -> Int32 {
        let raw = try Data(contentsOf: URL(fileURLWithPath: file))
        let settings = Fields(try Json.read(Bytes(raw), limit: 1 << 20), "settings")
        let until = try settings.text("until", .any)
        var isHeard = false
        var own = DeviceSettings(jobs: ["heart-*"])
        own.capabilities = ["os": "linux"]
        own.encoding = Deltas.Encoding(rawValue: try settings.text("encoding", .any).lowercased())!
        own.compressed = try settings.bool("compressed")
        (own.waitSeconds, own.selectionSeconds) = (0, 0)
        let transport = URLSessionTransport(address: try settings.text("url", .any))
        Self.transport = transport
        let device = try Device(
            connection: GatewayConnection(transport),
            trust: Trust(root: Bytes(settings.text("root", .any)), production: settings.bool("production")),
            token: settings.text("token", .any), key: testKey(Bytes.fromHex(settings.text("key", .any))),
            source: Source(), components: ComponentResolver(
                trainers: ["executorch": AddingTrainer()],
                filters: ["double": { $0.mapValues { Tensor(shape: $0.shape, values: $0.values.map { $0 * 2 }) } }]),
            folder: URL(fileURLWithPath: folder), settings: own,
            event: { name, details in
                let said = Json.object(details.merging(["event": .string(name)]) { _, new in new })
                print(String(decoding: (try? CanonicalJson.write(said)) ?? [], as: UTF8.self))
                isHeard = isHeard || name == until
            })
        for _ in 0..<(try settings.integer("steps", 1...1000)) where !isHeard {
            Thread.sleep(forTimeInterval: min(device.step(), 0.2))
        }
        return isHeard ? 0 : 1
    }

    /// Adds 0.5 to every number: it shows what a device does around training, not training.
    private struct AddingTrainer: Trainer {
        func train(
            graph: Bytes, params: TrainingParams, model: [String: Tensor], dataset: Dataset, goOn: () throws -> Void
        ) throws -> [String: Tensor] {
            try goOn()
            return model.mapValues { Tensor(shape: $0.shape, values: $0.values.map { $0 + 0.5 }) }
        }
    }

    private struct Source: DataSource {
        func dataset(job: String, config: [String: Json]) throws -> Dataset { Examples() }
    }

    private struct Examples: Dataset {
        let count = 8

        func batches(of size: Int) -> AnyIterator<Batch> { AnyIterator { nil } }
    }
}
