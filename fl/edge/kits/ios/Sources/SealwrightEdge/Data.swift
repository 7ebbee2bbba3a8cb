/// One step's inputs, of the graph's input shape, and labels: class numbers or float32, as the graph takes them.
public struct Batch {
    public enum Labels {
        case classes([Int64])
        case numbers(Tensor)
    }

    public let inputs: Tensor
    public let labels: Labels

    public init(inputs: Tensor, labels: Labels) {
        self.inputs = inputs
        self.labels = labels
    }
}

/// A device's examples for one job.
public protocol Dataset {
    /// How many examples there are.
    var count: Int { get }

    /// One pass over them, shuffled, in batches of exactly `size`; what is left over is left out.
    func batches(of size: Int) -> AnyIterator<Batch>
}

/// Where an app's examples are.
public protocol DataSource {
    /// The examples for the job of this name, with the task's configuration.
    func dataset(job: String, config: [String: Json]) throws -> Dataset
}

/// Turns a model (before training) or a difference (before it is sent) into another with the same names and shapes.
public typealias Filter = ([String: Tensor]) throws -> [String: Tensor]

/// Hears of joined, task, trained, dropped, reported, refused, waiting and over, with details.
public typealias Event = (_ name: String, _ details: [String: Json]) -> Void

/// Why a device shall not work now (battery, network, use); nil if it may.
public typealias Condition = () -> String?

/// The first reason of several conditions.
public func all(_ conditions: Condition...) -> Condition {
    { conditions.lazy.compactMap { $0() }.first }
}
