import Network
import SealwrightEdge
import UIKit

/// When a phone may work.
enum Conditions {
    /// On the charger, or with at least this much of its battery, and not saving power.
    @MainActor
    static func battery(percent: Int) -> Condition {
        let device = UIDevice.current
        device.isBatteryMonitoringEnabled = true
        return {
            if ProcessInfo.processInfo.isLowPowerModeEnabled { return "the phone saves power" }
            let (state, level) = DispatchQueue.main.sync { (device.batteryState, device.batteryLevel) }
            if state == .charging || state == .full { return nil }
            let left = Int(level * 100)
            return left < percent ? "the battery is at \(left)%, below \(percent)%" : nil
        }
    }

    /// On a network that is not metered.
    static func network() -> Condition {
        let monitor = NWPathMonitor()
        monitor.start(queue: DispatchQueue(label: "org.sealwright.edge.network"))
        return {
            let path = monitor.currentPath
            if path.status != .satisfied { return "there is no network" }
            return path.isExpensive || path.isConstrained ? "the network is metered" : nil
        }
    }
}
