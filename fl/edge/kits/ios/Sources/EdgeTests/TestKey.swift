import SealwrightEdge

#if canImport(CryptoKit)
import CryptoKit
import Foundation

/// A device's key from its secret number.
func testKey(_ scalar: Bytes) throws -> DeviceKey { try P256.Signing.PrivateKey(rawRepresentation: scalar) }
#else
import COpenSSL

/// A device's key from its secret number.
func testKey(_ scalar: Bytes) throws -> DeviceKey {
    // SEC 1's ECPrivateKey on P-256.
    let curve: Bytes = [0xa0, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07]
    let der: Bytes = [0x30, 0x31, 0x02, 0x01, 0x01, 0x04, 0x20] + scalar + curve
    let key = der.withUnsafeBufferPointer { buffer in
        var start = buffer.baseAddress
        return d2i_PrivateKey(EVP_PKEY_EC, nil, &start, der.count)
    }
    guard let key else { throw Refused("this is no P-256 key") }
    return OpenSSLKey(key: key)
}

/// Lives as long as the process.
private struct OpenSSLKey: DeviceKey {
    let key: OpaquePointer

    func sign(_ message: Bytes) throws -> Bytes {
        let context = EVP_MD_CTX_new()
        defer { EVP_MD_CTX_free(context) }
        var der = Bytes(repeating: 0, count: 80)
        var size = der.count
        guard EVP_DigestSignInit(context, nil, EVP_sha256(), nil, key) == 1,
            EVP_DigestSign(context, &der, &size, message, message.count) == 1
        else { throw Refused("the key cannot sign") }
        let signature = der.withUnsafeBufferPointer { buffer in
            var start = buffer.baseAddress
            return d2i_ECDSA_SIG(nil, &start, size)
        }
        defer { ECDSA_SIG_free(signature) }
        var found = Bytes()
        for number in [ECDSA_SIG_get0_r(signature), ECDSA_SIG_get0_s(signature)] {
            var raw = Bytes(repeating: 0, count: 32)
            BN_bn2binpad(number, &raw, 32)
            found += raw
        }
        return found
    }
}
#endif
