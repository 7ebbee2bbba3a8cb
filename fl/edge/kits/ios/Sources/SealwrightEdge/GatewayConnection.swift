/// A device's way to gateways: the routes of the protocol over a transport, bounded in size.
public final class GatewayConnection {
    private static let prefix = "/edge/v1"
    private static let sealed = "application/octet-stream"
    private static let maxCharter = 32 << 20
    private static let maxProof = 128 << 10
    private static let maxAnswer = Answer.maxWords + 64
    private static let piece = 1 << 20

    private let transport: Transport

    public init(_ transport: Transport) { self.transport = transport }

    /// The charter's files; nil if there is none above this version.
    func charter(above version: Int64?) throws -> Bytes? {
        let query = version.map { "?above=\($0)" } ?? ""
        let response = try call("GET", "/charter" + query, limit: Self.maxCharter)
        return response.status == 204 ? nil : try done(response)
    }

    /// The gateway's introduction over our nonce.
    func proof(_ nonce: String) throws -> Bytes {
        let asked = try CanonicalJson.write(.object(["nonce": .string(nonce)]))
        let headers = ["Content-Type": "application/json"]
        return try done(call("POST", "/proof", headers, asked, limit: Self.maxProof))
    }

    /// The sealed answer to a sealed request.
    func send(_ message: DeviceProtocol.Message, _ sealed: Bytes) throws -> Bytes {
        try done(call("POST", "/" + message.rawValue, ["Content-Type": Self.sealed], sealed))
    }

    /// More of a sealed blob of which `have` is here: one byte at least.
    func blob(_ blob: Blob, have: Bytes) throws -> Bytes {
        let most = Int(blob.size) + Sealing.tagSize
        let headers = have.isEmpty ? [:] : ["Range": "bytes=\(have.count)-"]
        let response = try call("GET", "/blobs/" + blob.id, headers, limit: most, whole: false)
        if response.status == 200 { return response.body }
        guard response.status == 206 else { return try done(response) }
        guard response.headers["content-range"]?.hasPrefix("bytes \(have.count)-") == true, !response.body.isEmpty else {
            throw Refused("the gateway answers with another range")
        }
        return Array((have + response.body).prefix(most))
    }

    /// Send a sealed result in pieces, from where it was broken off; its sealed answer. Call again to go on.
    func upload(_ sealed: Bytes, ticket: String) throws -> Bytes {
        let path = "/uploads/" + crypto.sha256(sealed).hex
        var headers = ["Upload-Ticket": ticket]
        var at = try offset(done(call("GET", path, headers)), most: sealed.count)
        headers["Content-Type"] = Self.sealed
        headers["Upload-Length"] = String(sealed.count)
        while true {
            headers["Upload-Offset"] = String(at)
            let piece = Array(sealed[at..<min(at + Self.piece, sealed.count)])
            let response = try call("PUT", path, headers, piece)
            guard response.status == 202 || response.status == 409 else { return try done(response) }
            let before = at
            at = try offset(response.body, most: sealed.count)
            if at <= before, response.status == 202 {
                throw GatewayUnavailable("the gateway takes no further pieces")
            }
        }
    }

    private func offset(_ body: Bytes, most: Int) throws -> Int {
        guard let fields = try? Fields(Json.read(body, limit: Self.maxAnswer), "upload"),
            let offset = try? fields.integer("offset", 0...Int64(most))
        else { throw GatewayUnavailable("the gateway names no offset") }
        return Int(offset)
    }

    private func call(
        _ method: String, _ path: String, _ headers: [String: String] = [:], _ body: Bytes? = nil,
        limit: Int = maxAnswer, whole: Bool = true
    ) throws -> Response {
        let response = try transport.call(method, Self.prefix + path, headers: headers, body: body, limit: limit)
        if !response.whole, whole || response.body.isEmpty { throw GatewayUnavailable("the answer broke off") }
        if response.status == 503 {
            let after = UInt16(response.headers["retry-after"] ?? "") ?? 0
            throw GatewayUnavailable("the gateway has no room", seconds: Double(after))
        }
        return response
    }

    private func done(_ response: Response) throws -> Bytes {
        if response.status == 200 { return response.body }
        if response.status == 410 { throw KeyRotated() }
        let body = try? Json.read(response.body, limit: Self.maxAnswer)
        var what = "without saying why"
        if case .string(let said)? = body?["error"]?["what"] { what = String(said.prefix(200)) }
        throw Refused("the gateway answers HTTP \(response.status): \(what)")
    }
}
