import CZlib

/// How a device's difference from a model travels (docs/reference/device-protocol.md).
public enum Deltas {
    public enum Encoding: String, CaseIterable {
        case f32, bf16, int8

        var dtype: String { self == .f32 ? "F32" : self == .bf16 ? "BF16" : "I8" }
    }

    /// Write finite tensors, in the order of their names. `draw` gives random numbers, uniform in [0, 1), by which
    /// `int8` rounds. Throws Refused for a number that is not finite.
    public static func encode(
        _ tensors: [String: Tensor], _ encoding: Encoding, draw: () -> Float, compressed: Bool
    ) throws -> Bytes {
        var parts: [String: Safetensors.Raw] = [:]
        for name in tensors.keys.sorted() {
            let tensor = tensors[name]!
            guard tensor.values.allSatisfy(\.isFinite) else {
                throw Refused("tensor '\(name)' holds a number that is not finite")
            }
            let scale = tensor.values.reduce(0) { max($0, abs($1)) } / 127
            var bytes = Bytes()
            bytes.reserveCapacity(tensor.values.count * Safetensors.width(encoding.dtype))
            for value in tensor.values {
                switch encoding {
                case .f32: append(value.bitPattern, to: &bytes)
                case .bf16: append(narrowed(value), to: &bytes)
                case .int8: bytes.append(UInt8(bitPattern: rounded(value, scale, draw())))
                }
            }
            parts[name] = Safetensors.Raw(dtype: encoding.dtype, shape: tensor.shape, bytes: bytes)
            if encoding == .int8 {
                let raw = Bytes.littleEndian(scale.bitPattern)
                parts[name + "#scale"] = Safetensors.Raw(dtype: "F32", shape: [], bytes: raw)
            }
        }
        let raw = try Safetensors.encode(parts)
        return compressed ? try deflated(raw) : raw
    }

    private static func append<Number: FixedWidthInteger>(_ number: Number, to bytes: inout Bytes) {
        withUnsafeBytes(of: number.littleEndian) { bytes.append(contentsOf: $0) }
    }

    /// To the nearest BF16, ties to even.
    private static func narrowed(_ value: Float) -> UInt16 {
        let bits = value.bitPattern
        return UInt16(truncatingIfNeeded: (bits &+ 0x7fff &+ ((bits >> 16) & 1)) >> 16)
    }

    /// Up with the probability that makes the mean right.
    private static func rounded(_ value: Float, _ scale: Float, _ draw: Float) -> Int8 {
        let steps = scale > 0 ? value / scale : 0
        let low = steps.rounded(.down)
        return Int8(max(-127, min(127, low + (draw < steps - low ? 1 : 0))))
    }

    private static func deflated(_ raw: Bytes) throws -> Bytes {
        var size = compressBound(uLong(raw.count))
        var out = Bytes(repeating: 0, count: Int(size))
        guard compress2(&out, &size, raw, uLong(raw.count), Z_BEST_SPEED) == Z_OK else { throw Refused("zlib failed") }
        return Array(out[..<Int(size)])
    }
}
