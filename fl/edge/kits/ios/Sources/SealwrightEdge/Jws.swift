/// Signed JSON: compact JWS with Ed25519, one header form, canonical payloads. A key is never taken from a token.
enum Jws {
    private static let maxHeader = 1024
    private static let maxToken = 256 * 1024

    /// The `kid` of a token of this type. Throws Refused.
    static func signer(_ token: String, type: String) throws -> String {
        let parts = token.split(separator: ".", omittingEmptySubsequences: false)
        guard token.utf8.count <= maxToken, parts.count == 3 else { throw Refused("this is no compact JWS") }
        let header = try Json.readCanonical(Bytes.fromBase64Url(String(parts[0])), limit: maxHeader)
        guard case .string(let kid)? = header["kid"],
            header == ["alg": .string("Ed25519"), "kid": .string(kid), "typ": .string(type)]
        else { throw Refused("the token's header is not exactly alg Ed25519, kid, typ \(type)") }
        return kid
    }

    /// The payload of a token of this type that the raw key signed. Throws Refused.
    static func read(_ token: String, key: Bytes, type: String) throws -> [String: Json] {
        _ = try signer(token, type: type)
        let parts = token.split(separator: ".", omittingEmptySubsequences: false).map(String.init)
        let payload = try Bytes.fromBase64Url(parts[1])
        let signature = try Bytes.fromBase64Url(parts[2])
        guard crypto.isSigned(Bytes(parts[0] + "." + parts[1]), signature: signature, key: key) else {
            throw Refused("the signature does not verify")
        }
        return try Json.readCanonical(payload, limit: maxToken)
    }
}
