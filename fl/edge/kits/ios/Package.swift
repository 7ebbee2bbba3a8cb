// swift-tools-version:5.9
// The iOS kit's core, and what tests it on Linux and macOS. The ExecuTorch trainer and the example app are in Apple/.
import PackageDescription

let package = Package(
    name: "SealwrightEdge",
    // CryptoKit has ML-KEM and X-Wing from these on.
    platforms: [.iOS("26.0"), .macOS("26.0")],
    products: [.library(name: "SealwrightEdge", targets: ["SealwrightEdge"])],
    targets: [
        .systemLibrary(name: "CZlib"),
        .systemLibrary(name: "COpenSSL"),
        .target(
            name: "SealwrightEdge",
            dependencies: ["CZlib", .target(name: "COpenSSL", condition: .when(platforms: [.linux]))]
        ),
        .executableTarget(
            name: "EdgeTests",
            dependencies: ["SealwrightEdge", .target(name: "COpenSSL", condition: .when(platforms: [.linux]))]
        ),
    ]
)
