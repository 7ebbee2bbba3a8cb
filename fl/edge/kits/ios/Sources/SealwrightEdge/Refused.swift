/// Something did not hold: nothing was sent, or believed. It names every reason.
public struct Refused: Error {
    public let reasons: [String]

    public init(_ reasons: [String]) { self.reasons = reasons }

    public init(_ reason: String) { reasons = [reason] }
}

/// No gateway answers, or none has room: `seconds` is how long it asks to be left alone (0: it does not say).
public struct GatewayUnavailable: Error {
    public let what: String
    public let seconds: Double

    public init(_ what: String, seconds: Double = 0) {
        self.what = what
        self.seconds = seconds
    }
}

/// The group key is gone: ask for the gateway's proof again.
public struct KeyRotated: Error {}

/// The task is to be trained no further.
public struct TrainingStopped: Error {
    public let why: String

    public init(_ why: String) { self.why = why }
}
