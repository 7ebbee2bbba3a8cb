package org.sealwright.edge;

import java.io.IOException;
import java.nio.channels.FileChannel;
import java.nio.file.Files;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.nio.file.StandardOpenOption;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.List;
import java.util.stream.Stream;

/**
 * What a device remembers over its end, in a folder of its own: one state, the task, the result, the newest blobs.
 * A file is replaced whole or not at all. What is half there or of another version counts as nothing.
 */
final class Memory {
    static final int MAX_STATE = 1 << 20;
    private static final int KEPT_BLOBS = 4;
    private static final String STATE = "state.json";
    private static final String RESULT = "result";
    private final Path folder;

    /** {@code folder} is private to the device: an app's own files on a phone. */
    Memory(Path folder) {
        this.folder = folder;
        try {
            Files.createDirectories(folder);
        } catch (IOException error) {
            throw unusable(error);
        }
    }

    /** What was kept last; where a device begins if that is nothing, or cannot be gone on with. */
    Standing standing() {
        byte[] raw = read(STATE, MAX_STATE);
        if (raw == null) return Standing.BEGINNING;
        try {
            Standing found = Standing.read(raw);
            return found.state == Protocol.State.REPORTING && result() == null ? Standing.BEGINNING : found;
        } catch (Refused error) {
            return Standing.BEGINNING;
        }
    }

    void keep(Standing standing) {
        write(STATE, standing.toBytes());
        if (standing.state != Protocol.State.REPORTING) remove(RESULT);
    }

    /** The result that no gateway has acknowledged, or null. */
    byte[] result() { return read(RESULT, Integer.MAX_VALUE); }

    /** Keep a result; then keep that the device is reporting. */
    void keepResult(byte[] content) { write(RESULT, content); }

    /** What is here of a sealed blob. */
    byte[] blob(Blob blob) {
        byte[] found = read(blob.id, blob.size + Crypto.TAG_SIZE);
        return found == null ? new byte[0] : found;
    }

    /** Keep what has come of a sealed blob, and drop the oldest of the others. */
    void keepBlob(Blob blob, byte[] content) {
        write(blob.id, content);
        List<Path> others = new ArrayList<>();
        try (Stream<Path> files = Files.list(folder)) {
            files.filter(path -> path.getFileName().toString().length() == 64)
                    .filter(path -> !path.endsWith(blob.id)).forEach(others::add);
        } catch (IOException error) {
            throw unusable(error);
        }
        others.sort(Comparator.comparingLong(path -> path.toFile().lastModified()));
        for (int at = 0; at < others.size() - KEPT_BLOBS + 1; at++) remove(others.get(at).getFileName().toString());
    }

    void forgetBlob(Blob blob) { remove(blob.id); }

    private byte[] read(String name, long limit) {
        Path path = folder.resolve(name);
        try {
            return Files.size(path) > limit ? null : Files.readAllBytes(path);
        } catch (NoSuchFileException error) {
            return null;
        } catch (IOException error) {
            throw unusable(error);
        }
    }

    private void write(String name, byte[] content) {
        try {
            Path made = folder.resolve(".new." + name);
            Files.write(made, content);
            try (FileChannel file = FileChannel.open(made, StandardOpenOption.WRITE)) {
                file.force(true);
            }
            Files.move(made, folder.resolve(name), StandardCopyOption.ATOMIC_MOVE, StandardCopyOption.REPLACE_EXISTING);
        } catch (IOException error) {
            throw unusable(error);
        }
    }

    private void remove(String name) {
        try {
            Files.deleteIfExists(folder.resolve(name));
        } catch (IOException error) {
            throw unusable(error);
        }
    }

    private static Refused unusable(IOException error) {
        return new Refused("the device's folder cannot be used: " + error.getClass().getSimpleName());
    }
}
