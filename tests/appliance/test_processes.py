"""Watched processes: the dead are named, the living are ended, nobody outlives the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from appliance.processes import Processes
from policies.errors import Refused

SLEEP = [sys.executable, "-c", "import time; print('started', flush=True); time.sleep(60)"]


def gone(pid: int) -> bool:
    """Whether the process ended (a zombie that nobody reaped counts as ended)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: object, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]  # any callable without arguments
            return True
        time.sleep(0.02)
    return False


def test_a_killed_process_is_found_and_named_with_its_signal(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    processes.start("quiet", SLEEP)
    victim = processes.start("site-borealis", SLEEP)
    assert processes.dead() is None
    assert wait_until(lambda: "started" in victim.log.read_text())
    os.kill(victim.process.pid, signal.SIGKILL)
    assert wait_until(lambda: processes.dead() is not None)
    dead = processes.dead()
    assert dead is not None
    assert "site-borealis was ended by SIGKILL" in str(dead)
    processes.stop_all()
    assert wait_until(lambda: gone(victim.process.pid))


def test_stop_all_ends_a_process_that_ignores_the_polite_signal(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    stubborn = (
        "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('on', flush=True); time.sleep(60)"
    )
    watched = processes.start("stubborn", [sys.executable, "-c", stubborn])
    assert wait_until(lambda: "on" in watched.log.read_text())
    processes.stop_all()
    assert gone(watched.process.pid)


def test_waiting_for_an_end_is_bounded_and_says_what_it_waited_for(tmp_path: Path) -> None:
    processes = Processes(tmp_path)
    processes.start("slow", SLEEP)
    with pytest.raises(Refused, match="slow did not end within 0 s while it was refused"):
        processes.finish("slow", within=0.2, what="it was refused")
    processes.start("quick", [sys.executable, "-c", "raise SystemExit(3)"])
    assert processes.finish("quick", within=20, what="it ran") == 3


def test_children_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys,time; from pathlib import Path; from appliance.processes import Processes\n"
        f"w = Processes(Path({str(tmp_path)!r})).start('child', {SLEEP!r})\n"
        "print(w.process.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert wait_until(lambda: "started" in (tmp_path / "child.log").read_text())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert wait_until(lambda: gone(child))


WORKER = """
import os, sys, time
while True:  # what it starts bears its name until it becomes another program, or ends
    if os.fork() == 0:
        time.sleep(0.05)
        os._exit(0)
    os.wait()
"""
SERVICE = """
import subprocess, sys, time
worker = subprocess.Popen([sys.executable, sys.argv[1] + ".py"])  # its own words do not name it
print("started", worker.pid, flush=True)
worker.wait() if sys.argv[2] == "ends" else time.sleep(60)
"""


@pytest.mark.parametrize("then", ["lives", "ends"])
def test_a_lost_helper_is_named_unless_its_process_ends_with_it(tmp_path: Path, then: str) -> None:
    script, told = tmp_path / "evaluator.py", []
    script.write_text(WORKER)
    processes = Processes(tmp_path)
    service = processes.start(
        "broker", [sys.executable, "-c", SERVICE, str(script.with_suffix("")), then], lasting="evaluator.py"
    )
    try:
        assert wait_until(lambda: "started" in service.log.read_text())
        for _ in range(40):
            assert processes.dead() is None
            time.sleep(0.02)
        os.kill(int(service.log.read_text().split()[1]), signal.SIGKILL)
        assert wait_until(lambda: (found := processes.dead()) is not None and told.append(str(found)) is None)
    finally:
        processes.stop_all()
    named = "evaluator, process" if then == "lives" else "broker ended with exit status 0"
    assert named in told[0]
