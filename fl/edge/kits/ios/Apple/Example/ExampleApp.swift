import SealwrightEdge
import SwiftUI

/// Shows the device's public key, which the app's own service has a token issued for, and lets it work. Its bundle holds
/// 1.root.json, the gateways' address and the token.
@main
struct ExampleApp: App {
    @StateObject private var work = Work()

    var body: some Scene {
        WindowGroup {
            List {
                Section("Public key") { Text(work.publicKey).textSelection(.enabled) }
                Section("Events") { ForEach(work.events.indices, id: \.self) { Text(work.events[$0]) } }
            }
            .task { work.begin() }
        }
    }
}

@MainActor
final class Work: ObservableObject {
    @Published private(set) var publicKey = ""
    @Published private(set) var events: [String] = []

    func begin() {
        do {
            let folder = URL.applicationSupportDirectory.appending(path: "edge")
            try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
            let key = try EnclaveKey.get(folder.appending(path: "key"))
            publicKey = key.publicKey.derRepresentation.base64EncodedString()
            var settings = DeviceSettings(jobs: ["heart-*"])
            settings.capabilities = ["os": "ios"]
            let device = try Device(
                connection: GatewayConnection(URLSessionTransport(address: text("gateways.txt"))),
                trust: Trust(root: Bytes(resource("1.root.json"))), token: text("token.txt"), key: key,
                source: HeartRates(), components: ComponentResolver(trainers: ["executorch": ExecuTorchTrainer()]),
                folder: folder.appending(path: "device"), settings: settings,
                condition: all(Conditions.battery(percent: 50), Conditions.network()),
                event: { [weak self] name, details in
                    Task { @MainActor in self?.events.insert("\(name) \(details["why"] ?? .null)", at: 0) }
                })
            Thread.detachNewThread { device.run(until: { false }) }
        } catch {
            publicKey = "This phone cannot take part: \(error)"
        }
    }

    private func resource(_ name: String) throws -> Data {
        guard let url = Bundle.main.url(forResource: name, withExtension: nil) else { throw Refused("\(name) is missing") }
        return try Data(contentsOf: url)
    }

    private func text(_ name: String) throws -> String {
        String(decoding: try resource(name), as: UTF8.self).trimmingCharacters(in: .whitespacesAndNewlines)
    }
}
