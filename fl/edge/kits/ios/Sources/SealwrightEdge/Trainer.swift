/// Trains a model on a device's examples.
public protocol Trainer {
    /// The trained parameters of `model`, by its names. Calls `goOn` before each step, which throws TrainingStopped.
    /// Throws Refused for a graph or a configuration with which it cannot.
    func train(
        graph: Bytes, params: TrainingParams, model: [String: Tensor], dataset: Dataset, goOn: () throws -> Void
    ) throws -> [String: Tensor]
}

/// What of a task's configuration the trainer reads, by NVIDIA FLARE's names; other entries are the app's.
public struct TrainingParams {
    public let epoch: Int
    public let batchSize: Int
    public let lr: Double
    public let momentum: Double
    public let weightDecay: Double

    public init(_ config: [String: Json]) throws {
        let fields = Fields(config, "device_training_params")
        epoch = fields.isGiven("epoch") ? Int(try fields.integer("epoch", 1...1000)) : 1
        batchSize = Int(try fields.integer("batch_size", 1...65536))
        lr = try fields.number("lr", Double.leastNonzeroMagnitude...1e3)
        momentum = fields.isGiven("momentum") ? try fields.number("momentum", 0...1.0.nextDown) : 0
        weightDecay = fields.isGiven("weight_decay") ? try fields.number("weight_decay", 0...1) : 0
    }
}
