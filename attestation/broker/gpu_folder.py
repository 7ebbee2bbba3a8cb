"""A broker's folder of GPU endorsements: manifests and revocation data, read again when a file in it has changed."""

from __future__ import annotations

import threading
from pathlib import Path

from attestation.verifier.gpu.files import read_endorsement_folder


class GpuFolder:
    """The folder, and its content as it was read last. Safe to use from many threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._seen: tuple[tuple[str, int, int, int], ...] | None = None
        self._content = b""

    def read(self) -> bytes:
        """The bytes of the folder's GpuEndorsements. Raises Unusable or MalformedEndorsement, naming the file."""
        with self._lock:
            there = self._files()
            if there != self._seen:
                self._content = read_endorsement_folder(self._folder).to_bytes()
                self._seen = there
            return self._content

    def _files(self) -> tuple[tuple[str, int, int, int], ...]:
        try:
            found = sorted(self._folder.iterdir())
            marks = ((path.name, path.stat()) for path in found)
            return tuple((name, one.st_ino, one.st_size, one.st_mtime_ns) for name, one in marks)
        except OSError:
            return ()
