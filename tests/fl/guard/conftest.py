"""A hostile script in a real sandbox, and what it says it could do."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable

import pytest
from hostile_scripts import PRELUDE, SMALL, Attack

from fl.guard.libseccomp import call_number
from fl.guard.limits import Limits
from fl.guard.sandbox import Sandbox
from fl.guard.seccomp import ALLOWED, FORBIDDEN


@pytest.fixture(scope="session", autouse=True)
def _sandboxes_can_be_made() -> None:
    bubblewrap = shutil.which("bwrap")
    if bubblewrap is None:
        pytest.skip("bubblewrap is not installed (apt-get install bubblewrap)")
    probe = subprocess.run(
        [bubblewrap, "--unshare-user", "--ro-bind", "/", "/", "true"], capture_output=True, check=False
    )
    if probe.returncode != 0:
        pytest.skip(f"user namespaces are forbidden here: {probe.stderr.decode().strip()}")


@pytest.fixture(scope="session")
def numbers() -> bytes:
    """System call numbers by name, for scripts that call the kernel directly."""
    names = sorted(ALLOWED | FORBIDDEN | {"clone", "clone3", "socket", "socketpair", "ioctl", "prctl"})
    found = {name: call_number(name) for name in names}
    return json.dumps({name: number for name, number in found.items() if number is not None}).encode()


@pytest.fixture
def attack(numbers: bytes) -> Callable[..., Attack]:
    """Run the text of a script that has `from attack import *` before it; at most `seconds` long."""

    def run(
        text: str,
        *,
        limits: Limits = SMALL,
        data: dict[str, bytes] | None = None,
        in_sum: bool = True,
        seconds: float = 15.0,
        files: dict[str, bytes] | None = None,
    ) -> Attack:
        bundle = {
            "attack.py": PRELUDE.encode(),
            "numbers.json": numbers,
            "client.py": b"from attack import *\n" + text.encode(),
            **(files or {}),
        }
        sandbox = Sandbox(bundle, "client.py", [], data, limits=limits)
        if not in_sum:
            sandbox.enforcement = type(sandbox.enforcement)({}, ("switched off by this test",))
        ours, theirs = socket.socketpair()
        with ours, theirs, sandbox.start(theirs) as process:
            theirs.close()
            ours.settimeout(seconds)
            said = bytearray()
            while piece := ours.recv(1 << 16):
                said += piece
            outcome = process.wait(seconds)
        assert outcome is not None, "the script was still running"
        lines = bytes(said).splitlines()
        return Attack(outcome, json.loads(lines[-1]) if lines else {})

    return run
