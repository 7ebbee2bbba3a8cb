/// The components that an app has, by name. A task's configuration, which the charter approves, may name filters in
/// `filters_in` and `filters_out`; its format names the trainer. A name that the app does not have refuses the task:
/// nothing is loaded or guessed.
public struct ComponentResolver {
    private let trainers: [String: Trainer]
    private let filters: [String: Filter]

    public init(trainers: [String: Trainer], filters: [String: Filter] = [:]) {
        self.trainers = trainers
        self.filters = filters
    }

    func trainer(of task: DeviceTask) throws -> Trainer {
        guard let found = trainers[task.format] else { throw Refused("this app has no trainer for \(task.format)") }
        return found
    }

    /// The filters that the task's configuration names under `place`, in their order.
    func filters(of task: DeviceTask, _ place: String) throws -> [Filter] {
        guard task.config[place] != nil else { return [] }
        return try Fields(task.config, "config").texts(place, .word, most: 16).map { name in
            guard let filter = filters[name] else { throw Refused("this app has no filter \(name)") }
            return filter
        }
    }
}
