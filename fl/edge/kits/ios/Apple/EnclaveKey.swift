import CryptoKit
import Foundation
import SealwrightEdge

/// The device's P-256 key in the Secure Enclave: made there, and never out of it.
enum EnclaveKey {
    /// The key, made at the first call. `file` keeps what the Secure Enclave alone can use.
    static func get(_ file: URL) throws -> SecureEnclave.P256.Signing.PrivateKey {
        if let kept = try? Data(contentsOf: file) {
            return try SecureEnclave.P256.Signing.PrivateKey(dataRepresentation: kept)
        }
        let key = try SecureEnclave.P256.Signing.PrivateKey()
        try key.dataRepresentation.write(to: file, options: [.atomic, .completeFileProtectionUntilFirstUserAuthentication])
        return key
    }
}
