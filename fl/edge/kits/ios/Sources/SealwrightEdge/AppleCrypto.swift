#if canImport(CryptoKit)
import CryptoKit
import Foundation

/// CryptoKit, which has X-Wing from iOS 26 on.
struct AppleCrypto: Crypto {
    func sha256(_ message: Bytes) -> Bytes { Array(SHA256.hash(data: message)) }

    func encrypt(_ plain: Bytes, key: Bytes, nonce: Bytes, associated: Bytes) throws -> Bytes {
        let box = try AES.GCM.seal(
            plain, using: SymmetricKey(data: key), nonce: AES.GCM.Nonce(data: nonce), authenticating: associated)
        return Array(box.ciphertext + box.tag)
    }

    func decrypt(_ sealed: Bytes, key: Bytes, nonce: Bytes, associated: Bytes) throws -> Bytes {
        let box = try AES.GCM.SealedBox(combined: nonce + sealed)
        return Array(try AES.GCM.open(box, using: SymmetricKey(data: key), authenticating: associated))
    }

    func isSigned(_ message: Bytes, signature: Bytes, key: Bytes) -> Bool {
        guard let known = try? Curve25519.Signing.PublicKey(rawRepresentation: key) else { return false }
        return known.isValidSignature(signature, for: message)
    }

    func seal(_ plain: Bytes, publicKey: Bytes, info: Bytes) throws -> Bytes {
        do {
            let key = try XWingMLKEM768X25519.PublicKey(rawRepresentation: publicKey)
            var sender = try HPKE.Sender(
                recipientKey: key, ciphersuite: .XWingMLKEM768X25519_SHA256_AES_GCM_256, info: Data(info))
            return Array(sender.encapsulatedKey + (try sender.seal(plain)))
        } catch {
            throw Refused("the hybrid public key is malformed")
        }
    }

    func random(_ count: Int) -> Bytes {
        SymmetricKey(size: SymmetricKeySize(bitCount: 8 * count)).withUnsafeBytes { Array($0) }
    }
}

extension SecureEnclave.P256.Signing.PrivateKey: DeviceKey {
    public func sign(_ message: Bytes) throws -> Bytes { Array(try signature(for: message).rawRepresentation) }
}

extension P256.Signing.PrivateKey: DeviceKey {
    public func sign(_ message: Bytes) throws -> Bytes { Array(try signature(for: message).rawRepresentation) }
}
#endif
