#if !canImport(CryptoKit)
import COpenSSL

/// OpenSSL 3.5, whose primitives HPKE is composed of here.
struct OpenSSLCrypto: Crypto {
    private static let tagSize = 16
    private static let suite = Bytes("HPKE") + [0x64, 0x7a, 0x00, 0x01, 0x00, 0x02]
    private static let version = Bytes("HPKE-v1")
    private static let xwingLabel: Bytes = [0x5c, 0x2e, 0x2f, 0x2f, 0x5e, 0x5c]

    func sha256(_ message: Bytes) -> Bytes { digest("SHA256", message) }

    func encrypt(_ plain: Bytes, key: Bytes, nonce: Bytes, associated: Bytes) throws -> Bytes {
        let context = EVP_CIPHER_CTX_new()
        defer { EVP_CIPHER_CTX_free(context) }
        var out = Bytes(repeating: 0, count: plain.count + Self.tagSize)
        var count: Int32 = 0
        var good = EVP_EncryptInit_ex(context, EVP_aes_256_gcm(), nil, key, nonce) == 1
        good = good && EVP_EncryptUpdate(context, nil, &count, associated, Int32(associated.count)) == 1
        good = good && EVP_EncryptUpdate(context, &out, &count, plain, Int32(plain.count)) == 1
        var rest: Int32 = 0
        var end = Bytes(repeating: 0, count: Self.tagSize)
        good = good && EVP_EncryptFinal_ex(context, &end, &rest) == 1
        var tag = Bytes(repeating: 0, count: Self.tagSize)
        good = good && EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_GET_TAG, Int32(Self.tagSize), &tag) == 1
        guard good, rest == 0 else { throw Refused("AES-GCM failed") }
        out.replaceSubrange(plain.count..., with: tag)
        return out
    }

    func decrypt(_ sealed: Bytes, key: Bytes, nonce: Bytes, associated: Bytes) throws -> Bytes {
        guard sealed.count >= Self.tagSize else { throw Refused("it is too short") }
        let size = sealed.count - Self.tagSize
        var tag = Array(sealed[size...])
        let context = EVP_CIPHER_CTX_new()
        defer { EVP_CIPHER_CTX_free(context) }
        var out = Bytes(repeating: 0, count: size + Self.tagSize)
        var end = Bytes(repeating: 0, count: Self.tagSize)
        var count: Int32 = 0
        var good = EVP_DecryptInit_ex(context, EVP_aes_256_gcm(), nil, key, nonce) == 1
        good = good && EVP_DecryptUpdate(context, nil, &count, associated, Int32(associated.count)) == 1
        good = good && EVP_DecryptUpdate(context, &out, &count, sealed, Int32(size)) == 1
        good = good && EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_AEAD_SET_TAG, Int32(Self.tagSize), &tag) == 1
        guard good, EVP_DecryptFinal_ex(context, &end, &count) == 1 else { throw Refused("it does not open") }
        return Array(out[..<size])
    }

    func isSigned(_ message: Bytes, signature: Bytes, key: Bytes) -> Bool {
        guard let known = publicKey("ED25519", key) else { return false }
        defer { EVP_PKEY_free(known) }
        let context = EVP_MD_CTX_new()
        defer { EVP_MD_CTX_free(context) }
        return EVP_DigestVerifyInit(context, nil, nil, nil, known) == 1
            && EVP_DigestVerify(context, signature, signature.count, message, message.count) == 1
    }

    func seal(_ plain: Bytes, publicKey raw: Bytes, info: Bytes) throws -> Bytes {
        guard raw.count == hybridPublicSize, let mlkem = publicKey("ML-KEM-768", Array(raw[..<1184])),
            let x25519 = publicKey("X25519", Array(raw[1184...]))
        else { throw Refused("the hybrid public key is malformed") }
        defer {
            EVP_PKEY_free(mlkem)
            EVP_PKEY_free(x25519)
        }
        let (encapsulated, secret) = try encapsulate(mlkem)
        let (once, shared) = try agree(x25519)
        let xwing = digest("SHA3-256", secret + shared + once + Array(raw[1184...]) + Self.xwingLabel)
        let context = [0] + extract([], "psk_id_hash", []) + extract([], "info_hash", info)
        let root = extract(xwing, "secret", [])
        let key = expand(root, "key", context, 32)
        let nonce = expand(root, "base_nonce", context, 12)
        return encapsulated + once + (try encrypt(plain, key: key, nonce: nonce, associated: []))
    }

    func random(_ count: Int) -> Bytes {
        var system = SystemRandomNumberGenerator()
        return (0..<count).map { _ in UInt8.random(in: 0...255, using: &system) }
    }

    private func publicKey(_ kind: String, _ raw: Bytes) -> OpaquePointer? {
        EVP_PKEY_new_raw_public_key_ex(nil, kind, nil, raw, raw.count)
    }

    /// The encapsulation, and the secret in it.
    private func encapsulate(_ key: OpaquePointer) throws -> (Bytes, Bytes) {
        let context = EVP_PKEY_CTX_new_from_pkey(nil, key, nil)
        defer { EVP_PKEY_CTX_free(context) }
        var encapsulated = Bytes(repeating: 0, count: 1088)
        var secret = Bytes(repeating: 0, count: 32)
        var size = encapsulated.count
        var secretSize = secret.count
        guard EVP_PKEY_encapsulate_init(context, nil) == 1,
            EVP_PKEY_encapsulate(context, &encapsulated, &size, &secret, &secretSize) == 1,
            size == encapsulated.count, secretSize == secret.count
        else { throw Refused("the hybrid public key is malformed") }
        return (encapsulated, secret)
    }

    /// A fresh X25519 key's public half, and what it shares with `key`.
    private func agree(_ key: OpaquePointer) throws -> (Bytes, Bytes) {
        let making = EVP_PKEY_CTX_new_from_name(nil, "X25519", nil)
        defer { EVP_PKEY_CTX_free(making) }
        var once: OpaquePointer?
        guard EVP_PKEY_keygen_init(making) == 1, EVP_PKEY_generate(making, &once) == 1 else {
            throw Refused("no X25519 key can be made")
        }
        defer { EVP_PKEY_free(once) }
        let deriving = EVP_PKEY_CTX_new_from_pkey(nil, once, nil)
        defer { EVP_PKEY_CTX_free(deriving) }
        var raw = Bytes(repeating: 0, count: 32)
        var shared = Bytes(repeating: 0, count: 32)
        var size = raw.count
        var sharedSize = shared.count
        guard EVP_PKEY_get_raw_public_key(once, &raw, &size) == 1, EVP_PKEY_derive_init(deriving) == 1,
            EVP_PKEY_derive_set_peer(deriving, key) == 1, EVP_PKEY_derive(deriving, &shared, &sharedSize) == 1
        else { throw Refused("the hybrid public key is malformed") }
        return (raw, shared)
    }

    private func extract(_ salt: Bytes, _ label: String, _ input: Bytes) -> Bytes {
        hmac(salt.isEmpty ? Bytes(repeating: 0, count: 32) : salt, Self.version + Self.suite + Bytes(label) + input)
    }

    /// At most 32 bytes: one block of HKDF's expansion.
    private func expand(_ key: Bytes, _ label: String, _ info: Bytes, _ size: Int) -> Bytes {
        let labelled = Bytes.bigEndian(UInt16(size)) + Self.version + Self.suite + Bytes(label) + info
        return Array(hmac(key, labelled + [1])[..<size])
    }

    private func hmac(_ key: Bytes, _ message: Bytes) -> Bytes {
        var found = Bytes(repeating: 0, count: 32)
        var size = 0
        let made = EVP_Q_mac(
            nil, "HMAC", nil, "SHA256", nil, key, key.count, message, message.count, &found, found.count, &size)
        precondition(made != nil && size == found.count, "OpenSSL has no HMAC")
        return found
    }

    private func digest(_ name: String, _ message: Bytes) -> Bytes {
        var found = Bytes(repeating: 0, count: 32)
        var size = 0
        let made = EVP_Q_digest(nil, name, nil, message, message.count, &found, &size)
        precondition(made == 1 && size == found.count, "OpenSSL has no \(name)")
        return found
    }
}
#endif
