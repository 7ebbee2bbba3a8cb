import SealwrightEdge

/// Four measurements an example, and whether the user was at rest: what an app would read from its own records.
struct HeartRates: DataSource, Dataset {
    private static let inputs: [[Float]] = [
        [0.61, 0.62, 0.60, 0.63], [0.95, 1.10, 1.20, 1.31], [0.58, 0.57, 0.59, 0.58], [1.40, 1.38, 1.29, 1.17],
        [0.66, 0.64, 0.65, 0.66], [1.02, 1.15, 1.33, 1.41], [0.70, 0.69, 0.71, 0.70], [1.21, 1.24, 1.19, 1.28],
    ]
    private static let atRest: [Int64] = [1, 0, 1, 0, 1, 0, 1, 0]

    var count: Int { Self.inputs.count }

    func dataset(job: String, config: [String: Json]) throws -> Dataset { self }

    func batches(of size: Int) -> AnyIterator<Batch> {
        var left = Self.inputs.indices.shuffled()[...]
        return AnyIterator {
            guard left.count >= size else { return nil }
            let chosen = left.prefix(size)
            left = left.dropFirst(size)
            let values = chosen.flatMap { Self.inputs[$0] }
            let inputs = Tensor(shape: [Int64(size), Int64(Self.inputs[0].count)], values: values)
            return Batch(inputs: inputs, labels: .classes(chosen.map { Self.atRest[$0] }))
        }
    }
}
