/// How messages are sealed: requests to the gateways' group key, answers under a key of the request's own.
public enum Sealing {
    static let nonceSize = 12
    static let tagSize = 16
    private static let request = Bytes("sealwright-edge-request-v1\0")
    private static let signed = Bytes("sealwright-edge-signed-v1\0")
    private static let answer = Bytes("sealwright-edge-answer-v1\0")

    /// The id of a group key: SHA-256 of its raw public key.
    public static func keyId(_ groupKey: Bytes) -> Bytes { crypto.sha256(groupKey) }

    /// The body of a request: signed by the device's key, sealed to the group key. `charter`: its id in hex.
    public static func sealRequest(
        _ message: DeviceProtocol.Message, words: Bytes, tensors: Bytes, key: DeviceKey, groupKey: Bytes, charter: String
    ) throws -> Bytes {
        let content = Bytes.bigEndian(UInt32(words.count)) + words + tensors
        let about = try Bytes.fromHex(charter) + Bytes(message.rawValue + "\0")
        let signature = try key.sign(signed + about + content)
        let id = keyId(groupKey)
        return id + (try crypto.seal(content + signature, publicKey: groupKey, info: request + about + id))
    }

    /// The words of an answer to the request with this id. Throws Refused.
    public static func openAnswer(_ body: Bytes, answerKey: Bytes, request: String) throws -> Bytes {
        let least = nonceSize + tagSize
        guard least < body.count, body.count <= Answer.maxWords + least,
            let words = try? crypto.decrypt(
                Array(body[nonceSize...]), key: answerKey, nonce: Array(body[..<nonceSize]),
                associated: answer + Bytes.fromHex(request))
        else { throw Refused("the answer is none to this request, or was changed on its way") }
        return words
    }

    /// The content of a blob. Throws Refused if it is not what the gateway named.
    public static func openBlob(_ blob: Blob, _ sealed: Bytes) throws -> Bytes {
        let none = Bytes(repeating: 0, count: nonceSize)  // a blob's key is used once
        guard Bytes(crypto.sha256(sealed).hex).isSame(as: Bytes(blob.id)),
            let content = try? crypto.decrypt(sealed, key: Bytes.fromHex(blob.key), nonce: none, associated: []),
            content.count == blob.size, Bytes(crypto.sha256(content).hex).isSame(as: Bytes(blob.sha256))
        else { throw Refused("a blob is not what the gateway named") }
        return content
    }
}
