// `EdgeTests vectors FOLDER OUT` holds the core against the protocol's vectors; `EdgeTests converse SETTINGS FOLDER`
// is a device that talks with a real gateway.
import Foundation

let arguments = CommandLine.arguments
switch arguments.count > 3 ? arguments[1] : "" {
case "vectors": exit(try VectorTests.run(folder: arguments[2], out: arguments[3]))
case "converse": exit(try Conversation.run(settings: arguments[2], folder: arguments[3]))
default:
    FileHandle.standardError.write(Data("usage: EdgeTests vectors FOLDER OUT | converse SETTINGS FOLDER\n".utf8))
    exit(2)
}
