/// JSON, strictly: one object, no doubled keys, bounded depth, integers of 53 bits.
public enum Json: Equatable {
    case null
    case bool(Bool)
    case integer(Int64)
    case number(Double)
    case string(String)
    case list([Json])
    case object([String: Json])

    static let maxInteger: Int64 = (1 << 53) - 1

    /// A field of an object; nil if there is none, or this is no object.
    subscript(name: String) -> Json? {
        if case .object(let fields) = self { return fields[name] }
        return nil
    }

    /// One object in any layout. Throws Refused.
    public static func read(_ raw: Bytes, limit: Int) throws -> [String: Json] {
        guard raw.count <= limit else { throw Refused("a document has more than \(limit) bytes") }
        var reader = Reader(raw: raw)
        reader.blanks()
        guard reader.peek() == UInt8(ascii: "{") else { throw Refused("this is no JSON object") }
        let value = try reader.object(0)
        reader.blanks()
        guard reader.at == raw.count else { throw reader.none() }
        return value
    }

    /// One object in its canonical form (RFC 8785). Throws Refused for anything else.
    public static func readCanonical(_ raw: Bytes, limit: Int) throws -> [String: Json] {
        let value = try read(raw, limit: limit)
        guard try CanonicalJson.write(.object(value)) == raw else { throw Refused("a document is not in canonical form") }
        return value
    }

    private struct Reader {
        let raw: Bytes
        var at = 0

        mutating func value(_ depth: Int) throws -> Json {
            guard depth <= 128 else { throw Refused("a document is nested too deeply") }
            switch peek() {
            case UInt8(ascii: "{"): return .object(try object(depth))
            case UInt8(ascii: "["): return .list(try list(depth))
            case UInt8(ascii: "\""): return .string(try string())
            case UInt8(ascii: "t"): return try word("true", .bool(true))
            case UInt8(ascii: "f"): return try word("false", .bool(false))
            case UInt8(ascii: "n"): return try word("null", .null)
            default: return try number()
            }
        }

        mutating func object(_ depth: Int) throws -> [String: Json] {
            var found: [String: Json] = [:]
            at += 1
            blanks()
            if take("}") { return found }
            while true {
                guard peek() == UInt8(ascii: "\"") else { throw none() }
                let name = try string()
                blanks()
                guard take(":") else { throw none() }
                blanks()
                guard found[name] == nil else { throw Refused("a key occurs twice") }
                found[name] = try value(depth + 1)
                blanks()
                if take("}") { return found }
                guard take(",") else { throw none() }
                blanks()
            }
        }

        mutating func list(_ depth: Int) throws -> [Json] {
            var found: [Json] = []
            at += 1
            blanks()
            if take("]") { return found }
            while true {
                found.append(try value(depth + 1))
                blanks()
                if take("]") { return found }
                guard take(",") else { throw none() }
                blanks()
            }
        }

        mutating func string() throws -> String {
            var found = Bytes()
            at += 1
            while true {
                let letter = try next()
                if letter == UInt8(ascii: "\"") { break }
                guard letter >= 0x20 else { throw none() }
                if letter == UInt8(ascii: "\\") {
                    found += Bytes(String(Character(try escaped())))
                } else {
                    found.append(letter)
                }
            }
            let text = String(decoding: found, as: UTF8.self)
            guard Array(text.utf8) == found else { throw Refused("a document is not UTF-8") }
            return text
        }

        private mutating func escaped() throws -> Unicode.Scalar {
            switch try next() {
            case UInt8(ascii: "\""): return "\""
            case UInt8(ascii: "\\"): return "\\"
            case UInt8(ascii: "/"): return "/"
            case UInt8(ascii: "b"): return "\u{8}"
            case UInt8(ascii: "f"): return "\u{c}"
            case UInt8(ascii: "n"): return "\n"
            case UInt8(ascii: "r"): return "\r"
            case UInt8(ascii: "t"): return "\t"
            case UInt8(ascii: "u"): break
            default: throw none()
            }
            var code = try unit()
            if 0xd800 <= code, code < 0xdc00 {
                guard take("\\"), take("u") else { throw none() }
                let low = try unit()
                guard 0xdc00 <= low, low < 0xe000 else { throw none() }
                code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00)
            }
            guard let scalar = Unicode.Scalar(code) else { throw none() }
            return scalar
        }

        private mutating func unit() throws -> UInt32 {
            var code: UInt32 = 0
            for _ in 0..<4 {
                guard let digit = Character(Unicode.Scalar(try next())).hexDigitValue else { throw none() }
                code = code * 16 + UInt32(digit)
            }
            return code
        }

        private mutating func number() throws -> Json {
            let start = at
            _ = take("-")
            if !take("0") { try digits() }
            var whole = true
            if take(".") {
                whole = false
                try digits()
            }
            if take("e") || take("E") {
                whole = false
                if !take("+") { _ = take("-") }
                try digits()
            }
            let text = String(decoding: raw[start..<at], as: UTF8.self)
            if whole {
                guard let integer = Int64(text), abs(integer) <= Json.maxInteger else {
                    throw Refused("an integer has more than 53 bits")
                }
                return .integer(integer)
            }
            guard let number = Double(text), number.isFinite else { throw none() }
            return .number(number)
        }

        private mutating func digits() throws {
            let start = at
            while 0x30 <= peek(), peek() <= 0x39 { at += 1 }
            guard at > start else { throw none() }
        }

        private mutating func word(_ word: String, _ value: Json) throws -> Json {
            for letter in word.utf8 where try next() != letter { throw none() }
            return value
        }

        mutating func blanks() {
            while [0x20, 0x09, 0x0a, 0x0d].contains(peek()) { at += 1 }
        }

        private mutating func take(_ letter: Unicode.Scalar) -> Bool {
            guard peek() == UInt8(ascii: letter), at < raw.count else { return false }
            at += 1
            return true
        }

        func peek() -> UInt8 { at < raw.count ? raw[at] : 0 }

        private mutating func next() throws -> UInt8 {
            guard at < raw.count else { throw none() }
            at += 1
            return raw[at - 1]
        }

        func none() -> Refused { Refused("this is no JSON document, at byte \(at)") }
    }
}
