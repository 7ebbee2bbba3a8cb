/// Writing JSON in the canonical form of RFC 8785, and in the one that TUF signs.
public enum CanonicalJson {
    /// RFC 8785. Throws Refused for what it cannot express.
    public static func write(_ value: Json) throws -> Bytes {
        var writer = Writer(tuf: false)
        try writer.value(value)
        return writer.out
    }

    /// The canonical JSON of TUF's signatures: it escapes quotes and backslashes alone, and has no fractions.
    static func writeForTuf(_ value: Json) throws -> Bytes {
        var writer = Writer(tuf: true)
        try writer.value(value)
        return writer.out
    }

    private struct Writer {
        let tuf: Bool
        var out = Bytes()

        mutating func value(_ value: Json) throws {
            switch value {
            case .null: out += Bytes("null")
            case .bool(let truth): out += Bytes(truth ? "true" : "false")
            case .integer(let integer):
                guard abs(integer) <= Json.maxInteger else { throw Refused("an integer has more than 53 bits") }
                out += Bytes(String(integer))
            case .number(let number):
                guard !tuf else { throw Refused("a fraction has no canonical form") }
                out += Bytes(try CanonicalJson.number(number))
            case .string(let text): string(text)
            case .list(let items):
                out.append(UInt8(ascii: "["))
                for (at, item) in items.enumerated() {
                    if at > 0 { out.append(UInt8(ascii: ",")) }
                    try self.value(item)
                }
                out.append(UInt8(ascii: "]"))
            case .object(let fields): try object(fields)
            }
        }

        private mutating func object(_ fields: [String: Json]) throws {
            out.append(UInt8(ascii: "{"))
            let names = fields.keys.sorted { $0.utf16.lexicographicallyPrecedes($1.utf16) }
            for (at, name) in names.enumerated() {
                if at > 0 { out.append(UInt8(ascii: ",")) }
                string(name)
                out.append(UInt8(ascii: ":"))
                try value(fields[name]!)
            }
            out.append(UInt8(ascii: "}"))
        }

        private mutating func string(_ text: String) {
            out.append(UInt8(ascii: "\""))
            for letter in text.utf8 {
                if letter == UInt8(ascii: "\"") || letter == UInt8(ascii: "\\") {
                    out += [UInt8(ascii: "\\"), letter]
                } else if letter >= 0x20 || tuf {
                    out.append(letter)
                } else {
                    out += control(letter)
                }
            }
            out.append(UInt8(ascii: "\""))
        }

        private func control(_ letter: UInt8) -> Bytes {
            let short: [UInt8: String] = [8: "\\b", 9: "\\t", 10: "\\n", 12: "\\f", 13: "\\r"]
            return Bytes(short[letter] ?? "\\u00" + [letter].hex)
        }
    }

    /// ECMAScript's form of Swift's digits, which are the fewest that read back as the same number.
    static func number(_ value: Double) throws -> String {
        guard value.isFinite else { throw Refused("a number is not finite") }
        if value == 0 { return "0" }
        let parts = value.magnitude.description.split(separator: "e")
        let mantissa = parts[0].split(separator: ".", omittingEmptySubsequences: false)
        let fraction = mantissa.count > 1 ? String(mantissa[1]) : ""
        let all = String(mantissa[0]) + fraction
        let digits = String(all.drop { $0 == "0" })
        let leading = all.count - digits.count
        let trimmed = String(digits.reversed().drop { $0 == "0" }.reversed())
        let point = mantissa[0].count - leading + (parts.count > 1 ? Int(parts[1])! : 0)
        return (value < 0 ? "-" : "") + placed(trimmed, point)
    }

    private static func placed(_ digits: String, _ point: Int) -> String {
        let count = digits.count
        if count <= point, point <= 21 { return digits + zeros(point - count) }
        if 0 < point, point <= 21 { return digits.prefix(point) + "." + digits.dropFirst(point) }
        if -6 < point, point <= 0 { return "0." + zeros(-point) + digits }
        let fraction = count == 1 ? "" : "." + digits.dropFirst()
        let sign = point > 0 ? "+" : "-"
        return "\(digits.prefix(1))\(fraction)e\(sign)\(abs(point - 1))"
    }

    private static func zeros(_ count: Int) -> String { String(repeating: "0", count: count) }
}
