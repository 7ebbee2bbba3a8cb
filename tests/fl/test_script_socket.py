"""What a hostile training script can say to its site over the one socket: all of it refused, nothing leaked."""

from __future__ import annotations

import array
import fcntl
import gc
import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl.errors import ScriptFailed
from fl.model import tensors_of
from fl.site.script import MAX_VALUES_A_ROUND, ScriptSession
from fl.tensors import encode
from fl.transport.local import MAX_MESSAGE, ScriptSocket
from fl.transport.memory import SEALS, DraftMemory, SealedMemory

UPDATE = encode(tensors_of({"w": np.ones(2, dtype=np.float32)}))
GOOD = {"kind": "update", "round": 0, "params_type": "FULL", "metrics": {}, "weight": 1.0}


def sealed(data: bytes = UPDATE, seals: int = SEALS) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.write(descriptor, data)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def converse(say: Callable[[socket.socket], None], seconds: float = 5.0) -> tuple[Any, SealedMemory]:
    """Run one round against a script that, after it got the model, does what `say` does, and then goes."""
    ours, theirs = ScriptSocket.pair()
    session = ScriptSession(ours, site="cygnus-bio", how_it_ended=lambda: "ended before the job was over")
    session._max_update = 4096

    def script() -> None:
        with theirs:
            theirs.recv(1 << 16)
            try:
                say(theirs)
            except (BrokenPipeError, ConnectionResetError):
                return

    thread = threading.Thread(target=script)
    thread.start()
    try:
        with SealedMemory.of(UPDATE) as model:
            return session.train(0, 1, model, seconds=seconds, value=lambda *_: None)
    finally:
        session.close()
        thread.join()


def send(sock: socket.socket, document: Any, *descriptors: int) -> None:
    raw = document if isinstance(document, bytes) else json.dumps(document).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    sock.sendmsg([raw], rights)
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_whole_sealed_update_is_taken() -> None:
    answer, memory = converse(lambda sock: send(sock, GOOD, sealed()))
    with memory:
        assert bytes(memory.view) == UPDATE
    assert answer.weight == 1.0


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        (b"\xff\xfe", "malformed"),
        (b"[" * 30000, "malformed"),
        ({**GOOD, "kind": "exec"}, "malformed"),
        ({**GOOD, "extra": 1}, "malformed"),
        ({**GOOD, "weight": "1"}, "malformed in update.weight"),
        (json.dumps({**GOOD, "weight": float("nan")}).encode(), "malformed in update.weight"),
        ({**GOOD, "metrics": {str(i): 1.0 for i in range(65)}}, "malformed in update.metrics"),
        (b" " * (MAX_MESSAGE + 10), "too long"),
        ({**GOOD, "round": 7}, "answered round 7 when asked for round 0"),
    ],
)
def test_malformed_words_end_the_conversation(document: Any, complaint: str) -> None:
    gc.collect()
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(ScriptFailed, match=complaint):
        converse(lambda sock: send(sock, document, sealed()))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before, "a descriptor was left open"


def test_an_update_that_could_still_change_is_refused() -> None:
    partly = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
    with pytest.raises(ScriptFailed, match="not sealed"):
        converse(lambda sock: send(sock, GOOD, sealed(seals=partly)))


def test_a_descriptor_that_is_no_memory_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(UPDATE)
    with pytest.raises(ScriptFailed, match="not a memory file"):
        converse(lambda sock: send(sock, GOOD, os.open(path, os.O_RDONLY)))
    with pytest.raises(ScriptFailed, match="not a memory file"):
        converse(lambda sock: send(sock, GOOD, os.open("/dev/zero", os.O_RDONLY)))


def test_size_descriptors_and_values_are_bounded() -> None:
    with pytest.raises(ScriptFailed, match="1 to 4096 are allowed"):
        converse(lambda sock: send(sock, GOOD, sealed(b"\0" * 5000)))
    with pytest.raises(ScriptFailed, match="too many descriptors"):
        converse(lambda sock: send(sock, GOOD, sealed(), sealed()))
    with pytest.raises(ScriptFailed, match="too many descriptors"):
        converse(lambda sock: send(sock, GOOD, *(sealed() for _ in range(50))))
    with pytest.raises(ScriptFailed, match="without tensors"):
        converse(lambda sock: send(sock, GOOD))
    value = {"kind": "log", "key": "x", "value": 1.0, "step": 0}
    with pytest.raises(ScriptFailed, match="descriptor with a value"):
        converse(lambda sock: send(sock, value, sealed()))
    with pytest.raises(ScriptFailed, match="more than 10000 values"):
        converse(lambda sock: [send(sock, value) for _ in range(MAX_VALUES_A_ROUND + 1)] and None)


def test_a_script_that_ends_or_stalls_is_told_apart() -> None:
    with pytest.raises(ScriptFailed, match="ended before the job was over"):
        converse(lambda _: None)
    with pytest.raises(ScriptFailed, match="did not answer round 0 within 0 s"):
        converse(lambda _: threading.Event().wait(0.6) and None, seconds=0.2)


def test_a_sealed_file_cannot_be_changed_by_whoever_made_it() -> None:
    with DraftMemory(8) as draft:
        draft.view[:] = b"original"
        descriptor, size = draft.seal()
    copy = os.dup(descriptor)
    with SealedMemory(descriptor, size) as memory:
        with pytest.raises(PermissionError):
            os.pwrite(copy, b"changed!", 0)
        with pytest.raises(PermissionError):
            os.ftruncate(copy, 2)
        memory.view[:3] = b"own"  # a private change
        assert os.pread(copy, 8, 0) == b"original"
    os.close(copy)
