"""A process that has the heavy imports done and forks one child per simulated client.

It does nothing else, so that forking it is safe: one thread, no computation. It is started by `python -m
fl.environments.fork_server NUMBER MODULE...`, without any state of the author's script; or, where the author's process
has imported torch already and can be forked itself (`fl.environments.forking`), as a fork of that, which saves a second
import. It speaks over the socket of that number: requests in, each with the
client's end of its script socket as a descriptor; the children's exits out. When the other end goes, it ends its
children and itself.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import importlib
import json
import logging.config
import os
import runpy
import selectors
import signal
import socket
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, Final

from fl.client import SOCKET_VARIABLE

PR_SET_PDEATHSIG: Final = 1


def main(control: socket.socket, preload: list[str]) -> None:
    """Serve fork requests until the other end of `control` goes."""
    # Python 3.12 and later warn of any fork beside threads; those of NumPy's BLAS take care of forks themselves.
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
    gc.disable()  # imports make objects that stay: looking at them again and again is an eighth of their time
    for module in preload:
        importlib.import_module(module)
    gc.freeze()
    gc.enable()
    wake_read, wake_write = socket.socketpair()
    wake_write.setblocking(False)
    wake_read.setblocking(False)
    signal.set_wakeup_fd(wake_write.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: dict[int, str] = {}
    selector = selectors.DefaultSelector()
    selector.register(control, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    try:
        while True:
            for key, _ in selector.select():
                if key.fileobj is wake_read:
                    with contextlib.suppress(BlockingIOError):
                        wake_read.recv(4096)
                    _report_exits(control, children)
                elif not _serve_one(control, children, (wake_read, wake_write)):
                    return
    finally:
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def _serve_one(control: socket.socket, children: dict[int, str], others: tuple[socket.socket, ...]) -> bool:
    raw, ancillary, _, _ = control.recvmsg(1 << 16, socket.CMSG_LEN(4))
    if not raw:
        return False
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data)
    request: dict[str, Any] = json.loads(raw)
    if "kill" in request:
        for pid, name in children.items():
            if request["kill"] in (name, "*"):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        return True
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            for other in (control, *others):
                other.close()
            status = _run_script(request, descriptors[0])
        finally:
            os._exit(status)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)
    children[pid] = request["name"]
    for descriptor in descriptors:
        os.close(descriptor)
    return True


def _run_script(request: dict[str, Any], descriptor: int) -> int:
    """Run the script as `python script args` would, in its own working folder, its output in its own log."""
    folder = Path(request["folder"])
    work = Path(request["work"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.chdir(work)
    os.environ[SOCKET_VARIABLE] = str(descriptor)
    os.environ.update(request["environment"])
    if request["log_config"] is not None:
        logging.config.dictConfig(request["log_config"])
    script = str(folder / request["script"])
    sys.argv = [script, *request["args"]]
    sys.path[:0] = [str(Path(script).parent), str(folder)]
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115 - lives as long as the process
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(request["threads"])
        sys.modules["torch"].default_generator.seed()  # a process of its own draws numbers of its own
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        code = stop.code
        if code is not None and not isinstance(code, int):
            sys.stderr.write(f"{code}\n")
            code = 1
        return int(code or 0) & 0xFF
    except BaseException:  # the script's own error: shown in its log, told by the status
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _report_exits(control: socket.socket, children: dict[int, str]) -> None:
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        name = children.pop(pid, None)
        if name is not None:
            control.send(json.dumps({"name": name, "status": os.waitstatus_to_exitcode(status)}).encode())


def serve(connected: socket.socket, preload: list[str]) -> None:
    """`main`, with an interrupt left to the author's process to decide about."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with connected:
        main(connected, preload)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:])
