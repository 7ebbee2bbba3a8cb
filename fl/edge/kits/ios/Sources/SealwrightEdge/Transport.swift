/// What came back: `body` is what came before a cut, if `whole` is false.
public struct Response {
    public let status: Int
    /// By lower-case name.
    public let headers: [String: String]
    public let body: Bytes
    public let whole: Bool

    public init(status: Int, headers: [String: String], body: Bytes, whole: Bool) {
        self.status = status
        self.headers = headers
        self.body = body
        self.whole = whole
    }
}

/// HTTPS to whoever answers at the gateways' address. Nothing that it brings is believed.
public protocol Transport {
    /// One call, bounded in time: `path` begins below the gateways' address; `body` nil: none. Follows no redirects.
    /// Throws GatewayUnavailable if nothing came, or more than `limit` bytes.
    func call(_ method: String, _ path: String, headers: [String: String], body: Bytes?, limit: Int) throws -> Response
}
