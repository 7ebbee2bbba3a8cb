import Foundation
#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

/// Foundation's own HTTP, to whoever answers: what comes over it verifies itself. For one thread.
public final class URLSessionTransport: Transport {
    private static let timeout: TimeInterval = 30
    private static let callTimeout: TimeInterval = 600
    private let address: String
    private let call = Call()
    private let session: URLSession

    public init(address: String) {
        self.address = address
        let configuration = URLSessionConfiguration.ephemeral
        configuration.timeoutIntervalForRequest = Self.timeout
        configuration.timeoutIntervalForResource = Self.callTimeout
        session = URLSession(configuration: configuration, delegate: call, delegateQueue: nil)
    }

    deinit { session.invalidateAndCancel() }

    public func call(
        _ method: String, _ path: String, headers: [String: String], body: Bytes?, limit: Int
    ) throws -> Response {
        guard let url = URL(string: address + path), url.scheme == "https" else {
            throw Refused("the gateways' address is no https URL")
        }
        var request = URLRequest(url: url)
        request.httpMethod = method
        request.httpBody = body.map { Data($0) }
        for (name, value) in headers { request.setValue(value, forHTTPHeaderField: name) }
        call.begin(limit)
        session.dataTask(with: request).resume()
        call.done.wait()  // bounded by the session's time-outs
        guard let response = call.response else { throw GatewayUnavailable("no gateway answers") }
        guard call.body.count <= limit else { throw GatewayUnavailable("the answer is too long") }
        var told: [String: String] = [:]
        for (name, value) in response.allHeaderFields { told["\(name)".lowercased()] = "\(value)" }
        return Response(status: response.statusCode, headers: told, body: call.body, whole: call.error == nil)
    }

    /// One call's answer as it comes. The session calls it on one queue, and `done` comes before anybody else reads it.
    private final class Call: NSObject, URLSessionDataDelegate, @unchecked Sendable {
        let done = DispatchSemaphore(value: 0)
        private var limit = 0
        private(set) var response: HTTPURLResponse?
        private(set) var body = Bytes()
        private(set) var error: Error?

        func begin(_ limit: Int) {
            self.limit = limit
            (response, body, error) = (nil, [], nil)
        }

        func urlSession(
            _ session: URLSession, dataTask: URLSessionDataTask, didReceive response: URLResponse,
            completionHandler: @escaping (URLSession.ResponseDisposition) -> Void
        ) {
            self.response = response as? HTTPURLResponse
            completionHandler(.allow)
        }

        func urlSession(_ session: URLSession, dataTask: URLSessionDataTask, didReceive data: Data) {
            body += data
            if body.count > limit { dataTask.cancel() }
        }

        func urlSession(_ session: URLSession, task: URLSessionTask, didCompleteWithError error: Error?) {
            self.error = error
            done.signal()
        }

        func urlSession(
            _ session: URLSession, task: URLSessionTask, willPerformHTTPRedirection response: HTTPURLResponse,
            newRequest request: URLRequest, completionHandler: @escaping (URLRequest?) -> Void
        ) {
            completionHandler(nil)
        }

        #if canImport(Security)
        func urlSession(
            _ session: URLSession, didReceive challenge: URLAuthenticationChallenge,
            completionHandler: @escaping (URLSession.AuthChallengeDisposition, URLCredential?) -> Void
        ) {
            guard let trust = challenge.protectionSpace.serverTrust else {
                return completionHandler(.performDefaultHandling, nil)
            }
            completionHandler(.useCredential, URLCredential(trust: trust))
        }
        #endif
    }
}
