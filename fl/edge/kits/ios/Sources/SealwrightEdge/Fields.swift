/// What a text must look like.
public struct Form {
    let holds: (String) -> Bool

    public static let any = Form { _ in true }

    static func upTo(_ most: Int, least: Int = 0) -> Form {
        Form { least <= $0.unicodeScalars.count && $0.unicodeScalars.count <= most }
    }

    static func hex(_ digits: Int) -> Form {
        Form { $0.utf8.count == digits && $0.utf8.allSatisfy(isHexDigit) }
    }

    static func oneOf(_ words: String...) -> Form { Form { words.contains($0) } }

    static let word = upTo(128, least: 1)
    static let cookie = Form { (1...256).contains($0.utf8.count) && $0.utf8.allSatisfy(isHexDigit) }
    static let name = Form {
        (1...63).contains($0.utf8.count) && isLowerOrDigit($0.utf8.first!)
            && $0.utf8.allSatisfy { isLowerOrDigit($0) || isMark($0) }
    }
    static let job = Form {
        (1...128).contains($0.utf8.count) && isLetterOrDigit($0.utf8.first!)
            && $0.utf8.allSatisfy { isLetterOrDigit($0) || isMark($0) }
    }

    private static func isHexDigit(_ letter: UInt8) -> Bool { isDigit(letter) || (0x61...0x66).contains(letter) }

    private static func isDigit(_ letter: UInt8) -> Bool { (0x30...0x39).contains(letter) }

    private static func isLowerOrDigit(_ letter: UInt8) -> Bool { isDigit(letter) || (0x61...0x7a).contains(letter) }

    private static func isLetterOrDigit(_ letter: UInt8) -> Bool {
        isLowerOrDigit(letter) || (0x41...0x5a).contains(letter)
    }

    private static func isMark(_ letter: UInt8) -> Bool { letter == 0x2e || letter == 0x5f || letter == 0x2d }
}

/// The fields of one JSON object, read strictly: each has its type and bounds, and `end` refuses all others.
public final class Fields {
    public let values: [String: Json]
    private let place: String
    private var unread: Set<String>

    public init(_ values: [String: Json], _ place: String) {
        self.values = values
        self.place = place
        unread = Set(values.keys)
    }

    /// Whether there is such a field, and not null.
    public func has(_ name: String) -> Bool {
        if let value = values[name], value != .null { return true }
        unread.remove(name)
        return false
    }

    public func isGiven(_ name: String) -> Bool { values[name] != nil }

    public func any(_ name: String) -> Json? {
        unread.remove(name)
        return values[name]
    }

    public func text(_ name: String, _ form: Form) throws -> String {
        guard case .string(let text)? = any(name), form.holds(text) else { throw bad(name) }
        return text
    }

    /// A text of this form, or nil where there is none.
    public func textOrNil(_ name: String, _ form: Form) throws -> String? { has(name) ? try text(name, form) : nil }

    public func integer(_ name: String, _ bounds: ClosedRange<Int64>) throws -> Int64 {
        guard case .integer(let integer)? = any(name), bounds.contains(integer) else { throw bad(name) }
        return integer
    }

    public func number(_ name: String, _ bounds: ClosedRange<Double>) throws -> Double {
        let number: Double
        switch any(name) {
        case .integer(let integer)?: number = Double(integer)
        case .number(let found)?: number = found
        default: throw bad(name)
        }
        guard bounds.contains(number) else { throw bad(name) }
        return number
    }

    public func bool(_ name: String) throws -> Bool {
        guard case .bool(let truth)? = any(name) else { throw bad(name) }
        return truth
    }

    public func object(_ name: String) throws -> [String: Json] {
        guard case .object(let fields)? = any(name) else { throw bad(name) }
        return fields
    }

    public func fields(_ name: String) throws -> Fields { Fields(try object(name), place + "." + name) }

    public func list(_ name: String, most: Int) throws -> [Json] {
        guard case .list(let items)? = any(name), items.count <= most else { throw bad(name) }
        return items
    }

    public func texts(_ name: String, _ form: Form, most: Int) throws -> [String] {
        try list(name, most: most).map {
            guard case .string(let text) = $0, form.holds(text) else { throw bad(name) }
            return text
        }
    }

    public func objects(_ name: String, most: Int) throws -> [Fields] {
        try list(name, most: most).map {
            guard case .object(let fields) = $0 else { throw bad(name) }
            return Fields(fields, place + "." + name)
        }
    }

    /// Refuse fields that nothing has read.
    public func end() throws {
        guard unread.isEmpty else { throw Refused("\(place): unknown fields \(unread.sorted())") }
    }

    private func bad(_ name: String) -> Refused { Refused("\(place).\(name) is not what it must be") }
}
