import Foundation

/// Times as documents write them: RFC 3339 in UTC, whole seconds, with Z.
public enum Times {
    public static func read(_ text: String) throws -> Date {
        guard let date = formatter().date(from: text), write(date) == text else { throw Refused("this is no time") }
        return date
    }

    public static func write(_ date: Date) -> String { formatter().string(from: date) }

    private static func formatter() -> DateFormatter {
        let formatter = DateFormatter()
        formatter.locale = Locale(identifier: "en_US_POSIX")
        formatter.timeZone = TimeZone(secondsFromGMT: 0)
        formatter.dateFormat = "yyyy-MM-dd'T'HH:mm:ss'Z'"
        return formatter
    }
}
