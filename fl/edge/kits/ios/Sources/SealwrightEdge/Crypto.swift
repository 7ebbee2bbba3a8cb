/// The primitives that the kit stands on: CryptoKit's on Apple's systems, OpenSSL's on Linux, where the core is tested.
protocol Crypto {
    func sha256(_ message: Bytes) -> Bytes

    /// AES-256-GCM: the ciphertext, then its tag.
    func encrypt(_ plain: Bytes, key: Bytes, nonce: Bytes, associated: Bytes) throws -> Bytes

    /// Throws if it was not made with these.
    func decrypt(_ sealed: Bytes, key: Bytes, nonce: Bytes, associated: Bytes) throws -> Bytes

    /// Whether the holder of the raw Ed25519 key signed this.
    func isSigned(_ message: Bytes, signature: Bytes, key: Bytes) -> Bool

    /// HPKE (RFC 9180) in base mode with X-Wing (ML-KEM-768 and X25519), HKDF-SHA256 and AES-256-GCM: the encapsulated
    /// key (1,120 bytes), then the ciphertext. Throws Refused for a public key that is none.
    func seal(_ plain: Bytes, publicKey: Bytes, info: Bytes) throws -> Bytes

    /// Random bytes of the system.
    func random(_ count: Int) -> Bytes
}

/// A device's P-256 key, which its token names: the Secure Enclave's, that never leaves the phone, or any other.
public protocol DeviceKey {
    /// ECDSA with SHA-256: r, then s, 32 bytes each.
    func sign(_ message: Bytes) throws -> Bytes
}

#if canImport(CryptoKit)
let crypto: any Crypto = AppleCrypto()
#else
let crypto: any Crypto = OpenSSLCrypto()
#endif

let hybridPublicSize = 1184 + 32
