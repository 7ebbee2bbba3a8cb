"""From start to end: what a site gets to know, that the end is the end, and what is refused before."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from hostile_scripts import SMALL, Attacker

from fl.errors import SandboxFailed, SandboxUnusable
from fl.guard import control_groups
from fl.guard.mounts import view
from fl.guard.sandbox import Sandbox, SiteData, unprivileged_user
from fl.guard.sealed_data import seal

HELLO = {"client.py": b"print('hello')\n"}


def closed_within(sock: socket.socket, seconds: float) -> bool:
    """Whether every holder of the other end is gone: the kernel's word that no process survived."""
    sock.settimeout(seconds)
    try:
        return sock.recv(1) == b""
    except TimeoutError:
        return False


def test_ends(attack: Attacker) -> None:
    for text, kind, status, sentence in (
        ("", "finished", 0, "finished"),
        ("raise SystemExit(3)", "failed", 3, "ended with status 3"),
        ("raise SystemExit(137)", "failed", 137, "ended with status 137"),
        ("raise ValueError('why')", "failed", 1, "ended with status 1"),
        ("import signal\nsignal.raise_signal(15)", "signal", 143, "was ended by SIGTERM"),
        ("ctypes.string_at(0)", "signal", 139, "was ended by SIGSEGV"),
        ("os.abort()", "signal", 134, "was ended by SIGABRT"),
    ):
        outcome = attack(text).outcome
        assert (outcome.kind, outcome.exit_status, outcome.sentence) == (kind, status, sentence)
        assert ("why" in outcome.log.decode()) == ("why" in text)
        assert outcome.seconds < 5


def test_it_says_what_it_printed_while_it_runs() -> None:
    ours, theirs = socket.socketpair()
    script = b"import socket, sys\nprint('out')\nprint('err', file=sys.stderr)\nsocket.socket(fileno=3).recv(1)"
    with ours, theirs, Sandbox({"s.py": script}, "s.py", limits=SMALL).start(theirs) as process:
        deadline = time.monotonic() + 5
        while process.log()[0] != b"out\nerr\n" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.log() == (b"out\nerr\n", False)
        assert process.outcome() is None
        assert process.wait(0.01) is None
        ours.send(b"x")
        outcome = process.wait(5)
        assert outcome is not None
        assert outcome.kind == "finished"
        assert process.outcome() == outcome


def test_the_site_can_end_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, Sandbox({"s.py": b"import time\ntime.sleep(60)"}, "s.py", limits=SMALL).start(theirs) as process:
        theirs.close()
        process.kill()
        outcome = process.wait(5)
        assert outcome is not None
        assert (outcome.kind, outcome.sentence) == ("killed", "was ended by its site")
        assert closed_within(ours, 1)
        process.kill()


def test_leaving_the_block_ends_it_and_everything_it_started() -> None:
    ours, theirs = socket.socketpair()
    script = b"""
import os, signal, time
for n in range(1, 32):
    if n not in (9, 19): signal.signal(n, signal.SIG_IGN)
for _ in range(10):
    if os.fork() == 0: os.setsid(); break
os.write(1, b'x')
time.sleep(60)
"""
    with ours:
        with Sandbox({"s.py": script}, "s.py", limits=SMALL).start(theirs) as process:
            theirs.close()
            deadline = time.monotonic() + 5
            while len(process.log()[0]) < 11 and time.monotonic() < deadline:
                time.sleep(0.01)
        assert process.log()[0] == b"x" * 11
        assert process.outcome() is not None
        assert closed_within(ours, 0.5)


def test_a_daemon_does_not_survive_its_script() -> None:
    ours, theirs = socket.socketpair()
    script = b"""
import os, signal, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 3)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        os.write(3, b'daemon')
        time.sleep(60)
    os._exit(0)
os.wait()
time.sleep(0.1)
"""
    with ours, Sandbox({"s.py": script}, "s.py", limits=SMALL).start(theirs) as process:
        theirs.close()
        assert ours.recv(6) == b"daemon"
        outcome = process.wait(5)
        assert outcome is not None
        assert outcome.kind == "finished"
        assert closed_within(ours, 0.5)


def test_it_dies_with_its_site() -> None:
    """The site's process is killed outright: no handler of ours runs, and yet nothing is left."""
    ours, theirs = socket.socketpair()
    site = """
import socket, sys, time
from fl.guard.sandbox import Sandbox
process = Sandbox({"s.py": b"import socket, time\\nsocket.socket(fileno=3).send(b'r')\\ntime.sleep(60)"}, "s.py").start(
    socket.socket(fileno=int(sys.argv[1])))
time.sleep(60)
"""
    root = Path(__file__).resolve().parents[3]
    with (
        ours,
        subprocess.Popen([sys.executable, "-c", site, str(theirs.fileno())], pass_fds=[theirs.fileno()], cwd=root) as p,
    ):
        theirs.close()
        ours.settimeout(20)
        assert ours.recv(1) == b"r"
        p.send_signal(signal.SIGKILL)
        p.wait(5)
        assert closed_within(ours, 5)
    # The killed site could not remove its control groups; another sandbox does, once the kernel has reaped the dead.
    tables = Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text()
    deadline = time.monotonic() + 10
    left = [Path()]
    while left and time.monotonic() < deadline:
        with Sandbox(HELLO, "client.py", limits=SMALL).start() as process:
            process.wait(5)
        found = control_groups.hierarchies(*tables).values()
        left = [group for place in found for group in place.own.glob(f"sealwright-sandbox-{p.pid}-*")]
    assert left == []


def test_it_outlives_the_thread_that_started_it() -> None:
    """The kernel's parent-death signal is about threads; a site starts scripts from short-lived ones."""
    started = []
    sandbox = Sandbox({"s.py": b"import time\ntime.sleep(0.4)"}, "s.py", limits=SMALL)
    thread = threading.Thread(target=lambda: started.append(sandbox.start()))
    thread.start()
    thread.join()
    with started[0] as process:
        outcome = process.wait(5)
        assert outcome is not None
        assert outcome.kind == "finished"


def test_many_at_once_and_again() -> None:
    sandbox = Sandbox({"s.py": b"print(open('/data/d').read())"}, "s.py", data={"d": b"1"}, limits=SMALL)
    processes = [sandbox.start() for _ in range(4)]
    for process in processes:
        with process:
            outcome = process.wait(10)
            assert outcome is not None
            assert (outcome.kind, outcome.log) == ("finished", b"1\n")


def test_nothing_is_kept_open() -> None:
    Sandbox(HELLO, "client.py", limits=SMALL).start().__exit__(None, None, None)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with Sandbox(HELLO, "client.py", limits=SMALL).start() as process:
            process.wait(5)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_arguments_folders_and_packages(tmp_path: Path) -> None:
    bundle, package, library = tmp_path / "bundle", tmp_path / "mine", tmp_path / "lib"
    (bundle / "net").mkdir(parents=True)
    (bundle / "run.py").write_text(
        "import sys, mine, other, net.model\nprint(sys.argv, mine.__file__, other.__file__, net.model.x)\n"
    )
    (bundle / "net" / "model.py").write_text("x = 7\n")
    package.mkdir()
    (package / "__init__.py").write_text("")
    library.mkdir()
    (library / "other.py").write_text("")
    for folder in (tmp_path, package, library):
        folder.chmod(0o755)
    sandbox = Sandbox(bundle, "run.py", ["--x", "a b", "é"], packages=[package, library], limits=SMALL)
    shutil.rmtree(bundle)  # what was read when it was made is what runs
    with sandbox.start() as process:
        outcome = process.wait(5)
    assert outcome is not None
    assert outcome.log.decode() == (
        "['/bundle/run.py', '--x', 'a b', 'é'] /packages/mine/__init__.py /libraries/1/other.py 7\n"
    )


def test_large_data_arrives_whole() -> None:
    raw = os.urandom(1 << 20) * 24
    script = b"import hashlib\nprint(hashlib.sha256(open('/data/big', 'rb').read()).hexdigest())"
    with Sandbox({"s.py": script}, "s.py", data={"big": raw, "empty": b""}, limits=SMALL).start() as process:
        outcome = process.wait(10)
    assert outcome is not None
    assert outcome.log.decode().strip() == hashlib.sha256(raw).hexdigest()


def test_what_of_sys_path_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed packages, by name or by being part of the system; never a folder that merely is on the path."""
    (tmp_path / "lib" / "site-packages").mkdir(parents=True)
    system = next(path for path in Path("/usr/lib").iterdir() if path.is_dir() and not path.is_symlink())
    checkout = Path(__file__).resolve().parents[3]
    monkeypatch.setattr(
        sys, "path", ["", str(checkout), str(tmp_path), str(tmp_path / "lib/site-packages"), str(system)]
    )
    shown = view(())
    assert shown.site_paths == ("/site/0", str(system))
    assert (tmp_path / "lib/site-packages", "/site/0") in shown.binds
    assert not {checkout, tmp_path} & {source for source, _ in shown.binds}


@pytest.mark.parametrize(
    ("bundle", "script"),
    [
        ({"../x.py": b""}, "../x.py"),
        ({"/x.py": b""}, "/x.py"),
        ({"a//x.py": b""}, "a//x.py"),
        ({"./x.py": b""}, "./x.py"),
        ({"x\0.py": b""}, "x\0.py"),
        ({"": b""}, ""),
        ({"x.py": b"", "x.py/y": b""}, "x.py"),
        ({"x.py": b""}, "y.py"),
        ({f"{n}.py": b"" for n in range(1501)}, "0.py"),
    ],
)
def test_bad_bundles_are_refused(bundle: dict[str, bytes], script: str) -> None:
    with pytest.raises(SandboxUnusable):
        Sandbox(bundle, script)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    for data in ({"../x": b""}, {"": b""}, {".x": b""}, {"a/b": b""}):
        with pytest.raises(SandboxUnusable):
            Sandbox(HELLO, "client.py", data=data)
    for arguments in (["a\0b"], ["x" * 70000]):
        with pytest.raises(SandboxUnusable):
            Sandbox(HELLO, "client.py", arguments)
    for device in ("/dev/sda", "/dev/kvm", "/dev/mem", "/dev/nvidia0/../mem", "/dev/nvidia77"):
        declared = SiteData()
        declared.devices = (Path(device),)
        with pytest.raises(SandboxUnusable):
            Sandbox(HELLO, "client.py", data=declared)
    with pytest.raises(SandboxUnusable):
        Sandbox(HELLO, "client.py", packages=[tmp_path / "missing"])
    (tmp_path / "run.py").symlink_to("/etc/passwd")
    with pytest.raises(SandboxUnusable, match="neither a file nor a folder"):
        Sandbox(tmp_path, "run.py")


def test_without_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "defpath", "/nonexistent")
    with pytest.raises(SandboxFailed, match="apt-get install -y bubblewrap") as caught:
        Sandbox(HELLO, "client.py")
    assert caught.value.do == "Run `seal doctor`."


def test_where_bubblewrap_is_forbidden() -> None:
    """In a user namespace that allows no other: what a locked-down container or AppArmor gives."""
    code = """
from fl.guard.sandbox import Sandbox
from fl.errors import SandboxFailed
try:
    Sandbox({"s.py": b""}, "s.py").start()
except SandboxFailed as error:
    print(error)
"""
    outer = ["bwrap", "--dev-bind", "/", "/", "--unshare-user", "--disable-userns"]
    ran = subprocess.run(
        [*outer, sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert "the sandbox did not come up: bwrap:" in ran.stdout, ran.stderr
    assert "seal doctor" in ran.stdout


def test_a_sandbox_that_does_not_come_up_in_time() -> None:
    """A bubblewrap that never gets anywhere, in a place that any user may execute from."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        stuck = Path(folder, "bwrap")
        stuck.write_text("#!/bin/sh\nexec sleep 60\n")
        for path in (Path(folder), stuck):
            path.chmod(0o755)
        sandbox = Sandbox(HELLO, "client.py", limits=dataclasses.replace(SMALL, start_seconds=0.5))
        sandbox._bubblewrap = str(stuck)
        began = time.monotonic()
        with pytest.raises(SandboxFailed, match=r"did not come up within 0\.5 s"):
            sandbox.start()
        assert time.monotonic() - began < 5


def test_where_sums_cannot_be_held(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = control_groups.Enforcement({}, ("memory is bounded for each process alone, not in sum: read-only",))
    monkeypatch.setattr("fl.guard.sandbox.enforcement", lambda: missing)
    with pytest.raises(SandboxFailed, match="not in sum"):
        Sandbox(HELLO, "client.py", require_cgroup=True)
    with Sandbox(HELLO, "client.py", limits=SMALL).start() as process:
        outcome = process.wait(5)
        assert outcome is not None
        assert outcome.kind == "finished"


@pytest.mark.skipif(os.geteuid() != 0, reason="it runs unprivileged already")
def test_root_gives_itself_up(attack: Attacker) -> None:
    """Seen from the host, neither bubblewrap nor the script is root, nor any other user of the system."""
    ours, theirs = socket.socketpair()
    script = b"import socket\nsocket.socket(fileno=3).recv(1)"
    with ours, theirs, Sandbox({"s.py": script}, "s.py", limits=SMALL).start(theirs) as process:
        users = set()
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
            except (FileNotFoundError, ProcessLookupError):
                continue
            if fields["PPid"] == str(os.getpid()) and fields["Name"] == "bwrap":
                users.add(fields["Uid"].split("\t")[0])
        ours.send(b"x")
        process.wait(5)
    assert len(users) == 1
    assert int(users.pop()) >= 1_900_000_000


def test_unprivileged() -> None:
    """The same for a site that is not root: everything but the control group."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("not root, so every other test here has run unprivileged")
    python = shutil.which("python3", path="/usr/bin")
    if python is None:
        pytest.skip("no interpreter that an unprivileged user could execute (/usr/bin/python3)")
    code = """
import socket
from fl.guard.sandbox import Sandbox
ours, theirs = socket.socketpair()
script = b"import os\\nos.write(3, open('/data/d','rb').read() + str(os.getuid()).encode())"
with Sandbox({"s.py": script}, "s.py", data={"d": b"data"}).start(theirs) as process:
    print(process.wait(10).kind, ours.recv(100))
"""
    site = next(path for path in sys.path if path.endswith("site-packages"))
    root = Path(__file__).resolve().parents[3]
    ran = subprocess.run(
        ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", python, "-B", "-c", code],
        env={"PYTHONPATH": f"{root}:{site}"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if "ModuleNotFoundError" in ran.stderr or "ImportError" in ran.stderr or "Permission denied" in ran.stderr:
        pytest.skip(f"an unprivileged user cannot import Sealwright here: {ran.stderr.strip().splitlines()[-1]}")
    assert ran.stdout == "finished b'data1000'\n", ran.stderr


def test_whose_user_a_sandbox_is() -> None:
    every, container, alone = "0 0 4294967295", "0 100000 65536", "0 1000 1"
    assert unprivileged_user(every, every, 1_900_000_000) == 1_900_000_000
    assert unprivileged_user(container, container, 1_900_000_000) == 65535
    assert unprivileged_user(alone, alone, 1_900_000_000) is None
    assert unprivileged_user("0 1000 1\n1 100000 65535", container, 1_900_000_000) == 65535


def test_torch_trains_inside(attack: Attacker) -> None:
    ran = attack(
        """
import torch
from torch.utils.data import DataLoader, TensorDataset
from fl import errors
torch.manual_seed(0)
x = torch.randn(64, 4); y = x.sum(1, keepdim=True)
model = torch.nn.Linear(4, 1)
optimiser = torch.optim.SGD(model.parameters(), 0.1)
for epoch in range(8):
    for a, b in DataLoader(TensorDataset(x, y), batch_size=16, num_workers=2 if epoch == 0 else 0):
        loss = torch.nn.functional.mse_loss(model(a), b)
        optimiser.zero_grad(); loss.backward(); optimiser.step()
tell(loss=loss.item())
""",
        limits=dataclasses.replace(SMALL, memory_bytes=2 << 30, scratch_bytes=64 << 20, wall_seconds=60),
        seconds=60,
    )
    assert ran.outcome.kind == "finished", ran.outcome.log.decode()
    assert ran.said["loss"] < 0.01


def test_a_site_s_data_volume_is_shown_read_only_beside_its_files(attack: Attacker, tmp_path: Path) -> None:
    folder = tmp_path / "volume"
    (folder / "north").mkdir(parents=True)
    (folder / "north/scan").write_bytes(b"a scan")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o777)  # as open as it may be: the sandbox says what is read-only
    data = SiteData({"train.csv": b"1,2"})
    data.folder = folder
    said = attack(
        """
scan = "/user_data/north/scan"
attempt("write", lambda: open(scan, "wb"))
attempt("add", lambda: os.mkdir("/user_data/new"))
tell(read=open(scan).read(), beside=open("/data/train.csv").read())
""",
        data=data,
    ).said
    assert said == {"read": "a scan", "beside": "1,2", "write": "EROFS", "add": "EROFS"}
    assert (folder / "north/scan").read_bytes() == b"a scan"


STAND_INS = """
mount -t tmpfs -o mode=755 dev "$1" || exit 9
for name in null zero full random urandom tty; do cp -a "/dev/$name" "$1" || exit 9; done
for name in 0 ctl -uvm -uvm-tools -modeset; do mknod -m 666 "$1/nvidia$name" c 1 5 || exit 9; done
mkdir "$1/shm" && mount -t tmpfs shm "$1/shm" && mount --move "$1" /dev || exit 9
shift
exec "$@"
"""
"""Nodes that read as zeros, under the names of a GPU's, in a mount namespace of their own."""
WITH_GPU = """
import sys
from appliance import node
from attestation.attester.gpu_session import GpuSession
from fl.guard.sandbox import Sandbox, SiteData
from pathlib import Path
from types import SimpleNamespace

script = b'''
import os
seen = sorted(name for name in os.listdir("/dev") if "nvidia" in name)
print(seen, os.read(os.open("/dev/nvidia0", os.O_RDWR), 2) if seen else None, sep=";")
'''
boot = SimpleNamespace(gpu_session=lambda: GpuSession(Path("/x"), Path("/x")), disks={"data": Path(sys.argv[1])})
init = SimpleNamespace(user_data=None)
with node.site_data(init, boot, SimpleNamespace(vault=None), {"data": bytes(32)}) as data:
    for given in (data, SiteData(data)):
        with Sandbox({"s.py": script}, "s.py", data=given).start() as process:
            sys.stderr.write(process.wait().log.decode())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="making device nodes needs root")
def test_a_job_gets_the_nodes_of_gpus_that_its_guest_declares_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    (tmp_path / "data").write_bytes(b"".join(seal({"list.csv": b"1"}, bytes(32), salt=bytes(32))))
    line = ["unshare", "--mount", "--", "sh", "-c", STAND_INS, "sh", str(tmp_path / "dev")]
    line += [sys.executable, "-c", WITH_GPU, str(tmp_path / "data")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["['nvidia-uvm', 'nvidia0', 'nvidiactl'];b'\\x00\\x00'", "[];None"]
