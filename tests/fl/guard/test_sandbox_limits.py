"""A hostile script tries to use the machine up: each attempt ends at its limit and the site goes on."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time

import pytest
from hostile_scripts import SMALL, Attacker

from fl.guard.control_groups import enforcement
from fl.guard.limits import Limits, MiB, process_limits

held = enforcement()
in_sum = pytest.mark.skipif(len(held.groups) < 3, reason="no writable control group here: " + "; ".join(held.missing))
both_ways = pytest.mark.parametrize(
    "in_sum", [pytest.param(True, id="group", marks=in_sum), pytest.param(False, id="rlimits")]
)


@both_ways
def test_fork_bomb(attack: Attacker, in_sum: bool) -> None:
    ran = attack(
        """
import time
children = 0
try:
    while children < 1000:
        if os.fork() == 0:
            time.sleep(60)
        children += 1
except OSError as error:
    tell(children=children, error=errno.errorcode[error.errno])
""",
        in_sum=in_sum,
    )
    assert ran.said["error"] == "EAGAIN"
    assert SMALL.processes - 4 <= ran.said["children"] <= SMALL.processes
    assert ran.outcome.kind == "finished"


@both_ways
def test_thread_bomb(attack: Attacker, in_sum: bool) -> None:
    ran = attack(
        """
import threading
threading.stack_size(64 << 10)
threads, never = 0, threading.Event()
try:
    while threads < 1000:
        threading.Thread(target=never.wait, daemon=True).start()
        threads += 1
except RuntimeError:
    tell(threads=threads)
""",
        in_sum=in_sum,
    )
    assert SMALL.processes - 4 <= ran.said["threads"] <= SMALL.processes


@both_ways
def test_children_that_fork_on(attack: Attacker, in_sum: bool) -> None:
    """The classic: every child forks. It ends with its parent, whatever it has grown to."""
    began = time.monotonic()
    ran = attack(
        """
import time
deadline = time.monotonic() + 0.5
while time.monotonic() < deadline:
    try:
        os.fork()
    except OSError:
        pass
if os.getpid() == 2:
    tell(alive=True)
else:
    time.sleep(60)
""",
        in_sum=in_sum,
    )
    assert ran.said == {"alive": True}
    assert time.monotonic() - began < 10


def test_memory_bomb_by_itself(attack: Attacker) -> None:
    """RLIMIT_DATA stops one process, with an error that its author understands."""
    ran = attack("held = []\nwhile True: held.append(bytearray(16 << 20))", in_sum=False)
    assert (ran.outcome.kind, ran.outcome.exit_status) == ("failed", 1)
    assert b"MemoryError" in ran.outcome.log


@in_sum
@pytest.mark.parametrize(
    "bomb",
    [
        """
held = []
for _ in range(8):
    if os.fork() == 0: break
while True: held.append(b'x' * (8 << 20))
""",
        """
import mmap
held = []
while True:
    held.append(mmap.mmap(-1, 8 << 20))
    held[-1].write(b'x' * (8 << 20))
""",
        "while True: os.write(os.memfd_create('x'), b'x' * (8 << 20))",
        """
number = 0
while True:
    os.close(os.open(f'/scratch/{number}', os.O_CREAT | os.O_WRONLY))
    number += 1
""",
    ],
    ids=["forked", "shared", "memory files", "empty files"],
)
def test_memory_bombs_in_sum(attack: Attacker, bomb: str) -> None:
    """What escapes every limit of a single process stops at the control group's."""
    began = time.monotonic()
    limits = dataclasses.replace(SMALL, memory_bytes=96 * MiB, scratch_bytes=1 << 40)
    ran = attack(bomb, limits=limits)
    assert ran.outcome.kind == "memory", ran.outcome
    assert ran.outcome.sentence == "used more memory than its limit and was ended"
    assert time.monotonic() - began < 10


def test_scratch_has_an_end(attack: Attacker) -> None:
    ran = attack(
        """
written = 0
for folder in ("/scratch", "/tmp", "/dev/shm"):
    try:
        with open(folder + "/fill", "wb", buffering=0) as file:
            while True:
                written += file.write(b"x" * (1 << 20))
    except OSError as error:
        found[folder] = errno.errorcode[error.errno]
tell(written=written)
"""
    )
    written = ran.said.pop("written")
    assert written <= SMALL.scratch_bytes
    assert written >= SMALL.scratch_bytes - 2 * MiB
    assert set(ran.said.values()) == {"ENOSPC"}


def test_descriptors_and_file_sizes_have_an_end(attack: Attacker) -> None:
    limits = dataclasses.replace(SMALL, open_files=64, file_bytes=1 * MiB)
    ran = attack(
        """
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
held = []
def fill():
    while True: held.append(os.dup(0))
attempt("descriptors", fill)
count = len(held)
for descriptor in held: os.close(descriptor)
big = os.open("big", os.O_CREAT | os.O_WRONLY)
attempt("file", lambda: [os.write(big, b"x" * (1 << 20)) for _ in range(3)])
memory = os.memfd_create("big")
attempt("memory file", lambda: os.ftruncate(memory, 1 << 30))
tell(count=count)
""",
        limits=limits,
    )
    assert ran.said.pop("count") < 64
    assert ran.said == {"descriptors": "EMFILE", "file": "EFBIG", "memory file": "EFBIG"}


def test_processor_time_has_an_end(attack: Attacker) -> None:
    ran = attack("while True: pass", limits=dataclasses.replace(SMALL, cpu_seconds=1))
    assert ran.outcome.kind == "time"
    assert ran.outcome.seconds < 10


def test_narrower_limits_of_the_site_stay() -> None:
    """A booted guest's first program gives its own up for good: what is narrower than a sandbox's is not raised."""
    inside = b"import resource as r; print(r.getrlimit(r.RLIMIT_CORE), r.getrlimit(r.RLIMIT_MEMLOCK))"
    site = f"""
import socket
from fl.guard.sandbox import Sandbox
ours, theirs = socket.socketpair()
with ours, theirs, Sandbox({{"s.py": {inside!r}}}, "s.py").start(theirs) as process:
    print(process.wait(30).log.decode())
"""
    held = ["prlimit", "--core=0:0", "--memlock=65536:65536", sys.executable, "-c", site]
    done = subprocess.run(held, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "(0, 0) (65536, 65536)", done.stderr


def test_time_has_an_end(attack: Attacker) -> None:
    ran = attack(
        "import signal, time\nfor n in range(1, 32):\n    if n not in (9, 19): signal.signal(n, signal.SIG_IGN)\n"
        "tell(ready=True)\ntime.sleep(60)",
        limits=dataclasses.replace(SMALL, wall_seconds=0.3),
    )
    assert ran.said == {"ready": True}
    assert ran.outcome.kind == "time"
    assert ran.outcome.seconds < 3
    assert ran.outcome.sentence == "used more time than its limit and was ended"


def test_a_flood_of_output_is_thrown_away_and_waits_for_nobody(attack: Attacker) -> None:
    began = time.monotonic()
    ran = attack(
        """
block = b"x" * (1 << 20)
for _ in range(200):
    for stream in (1, 2):
        left = memoryview(block)
        while left: left = left[os.write(stream, left):]
tell(done=True)
"""
    )
    assert ran.said == {"done": True}
    assert ran.outcome.kind == "finished"
    assert ran.outcome.log == b"x" * SMALL.log_bytes
    assert ran.outcome.log_truncated
    assert time.monotonic() - began < 5


@in_sum
def test_processors_are_shared_out(attack: Attacker) -> None:
    """Half a processor: a loop of half a second's work takes about a second."""
    ran = attack(
        "import time\nt = time.monotonic()\nwhile time.process_time() < 0.4: pass\ntell(took=time.monotonic() - t)",
        limits=dataclasses.replace(SMALL, cpus=0.5),
    )
    assert ran.said["took"] > 0.5


def test_limits_that_make_no_sense_are_refused() -> None:
    for field, value in (
        ("memory_bytes", 0),
        ("processes", 1),
        ("wall_seconds", 0.0),
        ("cpus", 0.0),
        ("log_bytes", -1),
    ):
        with pytest.raises(ValueError, match=field):
            dataclasses.replace(SMALL, **{field: value})


def test_process_limits_count_the_data_on_top() -> None:
    import resource

    held = process_limits(Limits(memory_bytes=100 * MiB), data_bytes=50 * MiB, devices=False)
    assert held[resource.RLIMIT_DATA] == (150 * MiB, 150 * MiB)
    assert resource.RLIMIT_AS not in process_limits(Limits(), data_bytes=0, devices=True)
