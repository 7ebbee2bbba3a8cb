import Foundation
import SealwrightEdge

/// Stochastic gradient descent over the task's graph, by ExecuTorch.
struct ExecuTorchTrainer: Trainer {
    private static let wrapper = "net."

    func train(
        graph: Bytes, params: TrainingParams, model: [String: Tensor], dataset: Dataset, goOn: () throws -> Void
    ) throws -> [String: Tensor] {
        let file = FileManager.default.temporaryDirectory.appendingPathComponent(UUID().uuidString + ".pte")
        try Data(graph).write(to: file, options: .completeFileProtectionUntilFirstUserAuthentication)
        defer { try? FileManager.default.removeItem(at: file) }
        guard let program = TrainingGraph(file: file.path) else { throw Refused("the graph cannot be loaded") }
        guard let first = dataset.batches(of: params.batchSize).next() else {
            throw Refused("the device has \(dataset.count) examples, fewer than a batch of \(params.batchSize)")
        }
        try pass(program, first)  // the program allocates its parameters when it runs first
        try set(program, model)
        guard program.begin(withRate: params.lr, momentum: params.momentum, weightDecay: params.weightDecay) else {
            throw Refused("the graph has no parameters")
        }
        for _ in 0..<params.epoch {
            for batch in dataset.batches(of: params.batchSize) {
                try goOn()
                try pass(program, batch)
                guard program.step() else { throw Refused("the graph gives no gradients") }
            }
        }
        return try model.reduce(into: [:]) { found, one in
            guard let raw = program.values(of: Self.wrapper + one.key) else { throw Refused("a parameter is gone") }
            found[one.key] = Tensor(shape: one.value.shape, values: raw.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) })
        }
    }

    private func set(_ program: TrainingGraph, _ model: [String: Tensor]) throws {
        let unlike = Refused("the graph's parameters are not the model's tensors")
        guard program.names.count == model.count else { throw unlike }
        for (name, tensor) in model {
            let parameter = Self.wrapper + name
            let values = tensor.values.withUnsafeBytes { Data($0) }
            guard program.shape(of: parameter)?.map(\.int64Value) == tensor.shape,
                program.setValues(values, of: parameter)
            else { throw unlike }
        }
    }

    private func pass(_ program: TrainingGraph, _ batch: Batch) throws {
        let inputs = batch.inputs.values.withUnsafeBytes { Data($0) }
        let shape = batch.inputs.shape.map { NSNumber(value: $0) }
        let isGood: Bool
        switch batch.labels {
        case .classes(let classes):
            let labels = classes.withUnsafeBytes { Data($0) }
            isGood = program.passInputs(
                inputs, shape: shape, labels: labels, labelShape: [NSNumber(value: classes.count)], classes: true)
        case .numbers(let numbers):
            let labels = numbers.values.withUnsafeBytes { Data($0) }
            isGood = program.passInputs(
                inputs, shape: shape, labels: labels, labelShape: numbers.shape.map { NSNumber(value: $0) }, classes: false)
        }
        guard isGood else { throw Refused("the graph does not take this batch") }
    }
}
