import Foundation

public typealias Bytes = [UInt8]

extension Array where Element == UInt8 {
    public init(_ text: String) { self = Array(text.utf8) }

    public var hex: String { map { String($0 >> 4, radix: 16) + String($0 & 15, radix: 16) }.joined() }

    /// Lower-case hex. Throws Refused.
    public static func fromHex(_ text: String) throws -> Bytes {
        let digits = Array(text.utf8)
        guard digits.count % 2 == 0, Form.hex(digits.count).holds(text) else { throw Refused("this is no hex") }
        var found = Bytes()
        for at in stride(from: 0, to: digits.count, by: 2) {
            found.append((nibble(digits[at]) << 4) | nibble(digits[at + 1]))
        }
        return found
    }

    private static func nibble(_ digit: UInt8) -> UInt8 { digit < 0x40 ? digit - 0x30 : digit - 0x57 }

    /// Standard, padded base64. Throws Refused.
    public static func fromBase64(_ text: String) throws -> Bytes {
        guard let data = Data(base64Encoded: text), data.base64EncodedString() == text else {
            throw Refused("this is no standard base64")
        }
        return Array(data)
    }

    /// Base64url without padding. Throws Refused.
    static func fromBase64Url(_ text: String) throws -> Bytes {
        let standard = text.replacingOccurrences(of: "-", with: "+").replacingOccurrences(of: "_", with: "/")
        let padded = standard + String(repeating: "=", count: (4 - standard.utf8.count % 4) % 4)
        guard !text.contains("+"), !text.contains("/"), !text.contains("=") else { throw Refused("no base64url") }
        return try fromBase64(padded)
    }

    /// Compared in a time that does not depend on where they differ.
    func isSame(as other: Bytes) -> Bool {
        count == other.count && zip(self, other).reduce(UInt8(0)) { $0 | ($1.0 ^ $1.1) } == 0
    }

    static func bigEndian<Number: FixedWidthInteger>(_ number: Number) -> Bytes {
        Swift.withUnsafeBytes(of: number.bigEndian) { Array($0) }
    }

    static func littleEndian<Number: FixedWidthInteger>(_ number: Number) -> Bytes {
        Swift.withUnsafeBytes(of: number.littleEndian) { Array($0) }
    }

    /// The little-endian number at `start`.
    func number<Number: FixedWidthInteger>(at start: Int, as kind: Number.Type) -> Number {
        self[start..<(start + MemoryLayout<Number>.size)].reversed().reduce(0) { ($0 << 8) | Number(truncatingIfNeeded: $1) }
    }
}
