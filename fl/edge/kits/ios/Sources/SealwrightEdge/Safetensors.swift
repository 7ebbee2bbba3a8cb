/// Numbers of a shape, row by row.
public struct Tensor {
    public let shape: [Int64]
    public var values: [Float]

    public init(shape: [Int64], values: [Float]) {
        self.shape = shape
        self.values = values
    }
}

/// Safetensors files, strictly: ranges cover the data exactly once, and bounds are checked before allocation.
public enum Safetensors {
    private static let maxHeader = 16 << 20
    private static let maxTensors = 100_000
    private static let maxName = 512
    private static let maxRank = 16
    private static let maxCount: Int64 = (1 << 48) - 1
    private static let dtypes = Form.oneOf(
        "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")

    /// One tensor's bytes, little-endian.
    struct Raw {
        let dtype: String
        let shape: [Int64]
        let bytes: Bytes
    }

    private struct Entry {
        let name: String
        let dtype: String
        let shape: [Int64]
        let begin: Int64
        let end: Int64

        init(_ name: String, _ fields: Fields) throws {
            self.name = name
            dtype = try fields.text("dtype", dtypes)
            shape = try counts(fields.list("shape", most: maxRank))
            let offsets = try counts(fields.list("data_offsets", most: 2))
            try fields.end()
            guard offsets.count == 2 else { throw Refused("a tensor has no two offsets") }
            (begin, end) = (offsets[0], offsets[1])
            var size = Int64(width(dtype))
            for count in shape {
                let (product, tooLarge) = size.multipliedReportingOverflow(by: count)
                guard !tooLarge else { throw Refused("a tensor is too large") }
                size = product
            }
            guard end - begin == size else { throw Refused("a tensor's range is not as long as its shape says") }
        }
    }

    static func width(_ dtype: String) -> Int {
        dtype.hasSuffix("64") ? 8 : dtype.hasSuffix("32") ? 4 : dtype.hasSuffix("16") ? 2 : 1
    }

    /// The tensors of floats in a whole file, as float32. Throws Refused for every deviation from the format.
    public static func floats(_ file: Bytes) throws -> [String: Tensor] {
        guard file.count >= 8 else { throw Refused("the file ends before its header length") }
        let length = file.number(at: 0, as: UInt64.self)
        guard length <= maxHeader, length <= file.count - 8 else { throw Refused("the header is too long") }
        let data = 8 + Int(length)
        let text = Array(file[8..<data])
        guard text.first == UInt8(ascii: "{") else { throw Refused("the header does not begin with {") }
        var header = try Json.read(text, limit: maxHeader)
        if let metadata = header.removeValue(forKey: "__metadata__") { try check(metadata) }
        guard header.count <= maxTensors else { throw Refused("there are too many tensors") }
        let named = Fields(header, "header")
        let entries = try header.keys.map { name in
            guard isPrintable(name) else { throw Refused("a tensor's name is too long, empty or unprintable") }
            return try Entry(name, named.fields(name))
        }
        var at: Int64 = 0
        for entry in entries.sorted(by: { ($0.begin, $0.end) < ($1.begin, $1.end) }) {
            guard entry.begin == at else { throw Refused("ranges overlap or leave a hole") }
            at = entry.end
        }
        guard Int64(data) + at == file.count else { throw Refused("the data does not end with the file") }
        var found: [String: Tensor] = [:]
        for entry in entries where entry.dtype.contains("F") {
            let values = widened(file, data + Int(entry.begin), data + Int(entry.end), entry.dtype)
            found[entry.name] = Tensor(shape: entry.shape, values: values)
        }
        return found
    }

    /// One file, in the reference's own layout: by descending alignment, then name.
    static func encode(_ tensors: [String: Raw]) throws -> Bytes {
        let order = tensors.keys.sorted {
            let (left, right) = (width(tensors[$0]!.dtype), width(tensors[$1]!.dtype))
            return left == right ? $0.unicodeScalars.lexicographicallyPrecedes($1.unicodeScalars) : left > right
        }
        var entries: [String] = []
        var at = 0
        for name in order {
            let raw = tensors[name]!
            let quoted = String(decoding: try CanonicalJson.write(.string(name)), as: UTF8.self)
            let shape = raw.shape.map(String.init).joined(separator: ",")
            let end = at + raw.bytes.count
            entries.append("\(quoted):{\"dtype\":\"\(raw.dtype)\",\"shape\":[\(shape)],\"data_offsets\":[\(at),\(end)]}")
            at = end
        }
        var text = Bytes("{" + entries.joined(separator: ",") + "}")
        while text.count % 8 != 0 { text.append(UInt8(ascii: " ")) }
        return order.reduce(Bytes.littleEndian(UInt64(text.count)) + text) { $0 + tensors[$1]!.bytes }
    }

    private static func check(_ metadata: Json) throws {
        guard case .object(let entries) = metadata else { throw Refused("__metadata__ is no map") }
        for case let value in entries.values {
            guard case .string = value else { throw Refused("__metadata__ is no map of strings") }
        }
    }

    private static func counts(_ values: [Json]) throws -> [Int64] {
        try values.map {
            guard case .integer(let count) = $0, (0...maxCount).contains(count) else { throw Refused("a count is none") }
            return count
        }
    }

    private static func isPrintable(_ name: String) -> Bool {
        (1...maxName).contains(name.unicodeScalars.count) && name.unicodeScalars.allSatisfy { scalar in
            switch scalar.properties.generalCategory {
            case .control, .format, .surrogate, .privateUse, .unassigned, .lineSeparator, .paragraphSeparator:
                return false
            case .spaceSeparator:
                return scalar == " "
            default:
                return true
            }
        }
    }

    private static func widened(_ file: Bytes, _ begin: Int, _ end: Int, _ dtype: String) -> [Float] {
        stride(from: begin, to: end, by: width(dtype)).map { at in
            switch dtype {
            case "F64": return Float(Double(bitPattern: file.number(at: at, as: UInt64.self)))
            case "F32": return Float(bitPattern: file.number(at: at, as: UInt32.self))
            case "F16": return half(file.number(at: at, as: UInt16.self))
            default: return Float(bitPattern: UInt32(file.number(at: at, as: UInt16.self)) << 16)
            }
        }
    }

    /// IEEE 754 binary16.
    private static func half(_ bits: UInt16) -> Float {
        let exponent = UInt32(bits >> 10) & 31
        let fraction = UInt32(bits & 0x3ff)
        let size = exponent == 0
            ? Float(fraction) * 0x1p-24
            : Float(bitPattern: (exponent == 31 ? 0x7f80_0000 : (exponent + 112) << 23) | fraction << 13)
        return bits & 0x8000 == 0 ? size : -size
    }
}
