import Foundation

/// One file of TUF metadata, and the signatures over it.
struct Metadata {
    let signed: Fields
    let version: Int64
    let expires: Date
    /// SHA-256 (hex) of the signed part.
    let digest: String
    private let name: String
    private let signedBytes: Bytes
    private let signatures: [String: Bytes]

    init(_ name: String, _ raw: Bytes?, type: String) throws {
        self.name = name
        guard let raw else { throw Refused("\(name): missing") }
        let all = Fields(try Json.read(raw, limit: Charter.maxFile), name)
        var found: [String: Bytes] = [:]
        for one in try all.objects("signatures", most: 128) {
            let signature = try Bytes.fromHex(one.text("sig", .hex(128)))
            guard found.updateValue(signature, forKey: try one.text("keyid", .hex(64))) == nil else {
                throw Refused("\(name): a key signs twice")
            }
            try one.end()
        }
        signatures = found
        signed = try all.fields("signed")
        try all.end()
        signedBytes = try CanonicalJson.writeForTuf(.object(signed.values))
        digest = crypto.sha256(signedBytes).hex
        _ = try signed.text("_type", .oneOf(type))
        guard try signed.text("spec_version", .upTo(20)).hasPrefix("1.") else { throw Refused("\(name): is no TUF 1") }
        version = try signed.integer("version", 1...Int64(Int32.max))
        expires = try Times.read(signed.text("expires", .any))
    }

    /// Which of these keys (raw, by id) have signed.
    private func signers(_ keys: [String: Bytes]) -> Set<String> {
        Set(signatures.filter { id, signature in
            keys[id].map { crypto.isSigned(signedBytes, signature: signature, key: $0) } ?? false
        }.keys)
    }

    /// Check that at least `threshold` of these keys have signed. Throws Refused.
    func mustBeSigned(by keys: [String: Bytes], _ threshold: Int64) throws {
        let count = signers(keys).count
        guard count >= threshold else { throw Refused("\(name): needs \(threshold) signatures, has \(count)") }
    }

    /// Check that every signature is by one of these keys, and good. Throws Refused.
    func mustHaveNoOthers(than keys: [String: Bytes]) throws {
        guard signers(keys).count == signatures.count else { throw Refused("\(name): a signature is not valid") }
    }

    func mustHold(_ at: Date) throws {
        guard at < expires else { throw Refused("\(name): expired on \(Times.write(expires))") }
    }

    func mustBeVersion(_ wanted: Int64) throws {
        guard version == wanted else { throw Refused("\(name): says it is version \(version)") }
    }
}
