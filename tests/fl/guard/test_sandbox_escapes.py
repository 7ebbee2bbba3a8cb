"""A hostile script tries to reach the network, the host, other processes and the kernel's dangerous calls."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hostile_scripts import Attacker, needs_x86

from fl.guard.sandbox import Sandbox
from fl.guard.seccomp import FORBIDDEN, launch_filter


def test_it_sees_what_it_should_and_nothing_else(attack: Attacker) -> None:
    ran = attack(
        """
import sys
tell(
    root=sorted(os.listdir("/")), etc=sorted(os.listdir("/etc")), dev=sorted(os.listdir("/dev")),
    bundle=sorted(os.listdir("/bundle")), data=open("/data/train.csv").read(), cwd=os.getcwd(), argv=sys.argv,
    processes=sorted(name for name in os.listdir("/proc") if name.isdigit()), host=os.uname().nodename,
    user=[os.getuid(), os.geteuid(), os.getgid(), os.getgroups()],
    choices=os.listdir("/etc/alternatives") if os.path.isdir("/etc/alternatives") else [],
)
""",
        data={"train.csv": b"1,2,3"},
    )
    assert ran.outcome.kind == "finished", ran.outcome.log
    said = ran.said
    assert said["data"] == "1,2,3"
    assert said["dev"] == ["fd", "full", "null", "random", "shm", "urandom", "zero"]
    assert set(said["etc"]) - {"alternatives"} == {"group", "ld.so.cache", "nsswitch.conf", "passwd"}
    assert all(".so" in name for name in said["choices"])
    assert said["bundle"] == ["attack.py", "client.py", "numbers.json"]
    assert said["cwd"] == "/scratch"
    assert said["argv"] == ["/bundle/client.py"]
    assert said["processes"] == ["1", "2"]
    assert said["host"] == "sandbox"
    assert said["user"] == [1000, 1000, 1000, []]
    assert not {"home", "work", "run", "var", "sys", "mnt", "boot"} & set(said["root"])


def test_no_network(attack: Attacker) -> None:
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_INET) as tcp:
        name = f"\0sealwright-test-{os.getpid()}"
        abstract.bind(name)
        abstract.listen()
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        ran = attack(
            f"""
for family in range(2, 46):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
        attempt(f"{{family}} {{kind}}", lambda: socket.socket(family, kind) and "made")
    attempt(f"{{family}} pair", lambda: socket.socketpair(family) and "made")
attempt("tcp", lambda: socket.create_connection(("127.0.0.1", {tcp.getsockname()[1]})))
attempt("abstract", lambda: socket.socket(socket.AF_UNIX).connect({name!r}))
attempt("name", lambda: socket.getaddrinfo("example.org", 443))
tell(interfaces=[line.split(":")[0].strip() for line in open("/proc/net/dev").readlines()[2:]])
"""
        )
        abstract.setblocking(False)
        with pytest.raises(BlockingIOError):
            abstract.accept()
    assert ran.outcome.kind == "finished", ran.outcome.log
    assert ran.said.pop("interfaces") == ["lo"]
    assert ran.said.pop("abstract") == "ECONNREFUSED"
    assert "gaierror" in ran.said.pop("name")
    assert set(ran.said.values()) == {"ENOSYS"}, "from IPv4 to the newest family, UNIX sockets alone can be made"


def test_files_of_the_host_are_not_there(attack: Attacker, tmp_path: Path) -> None:
    secret = tmp_path / "secret.key"
    secret.write_text("secret")
    secret.chmod(0o644)
    repository = Path(__file__).resolve().parents[3]
    ran = attack(
        f"""
for path in ("/etc/shadow", "/etc/hostname", "/etc/machine-id", "/home", "/root/.ssh", "/root/.bash_history", "/var",
             "/run", "/sys", "/boot", {str(secret)!r}, {str(repository / "pyproject.toml")!r},
             {str(repository / ".git")!r}, {str(repository / "build")!r}, "/proc/1/root/etc/shadow", "/oldroot"):
    attempt(path, lambda: os.stat(path) and "there")
    attempt("/proc/self/root" + path, lambda: os.stat("/proc/self/root" + path) and "there")
    attempt("up " + path, lambda: os.stat("/scratch/" + "../" * 20 + path) and "there")
tell()
"""
    )
    assert ran.outcome.kind == "finished", ran.outcome.log
    assert set(ran.said.values()) <= {"ENOENT", "EACCES"}


def test_another_sites_data_is_not_there(attack: Attacker) -> None:
    ours, theirs = socket.socketpair()
    waiting = Sandbox(
        {"client.py": b"import socket\nsocket.socket(fileno=3).recv(1)"}, "client.py", data={"canary": b"x"}
    )
    with ours, theirs, waiting.start(theirs):
        theirs.close()
        ran = attack(
            """
seen = []
for top in ("/data", "/bundle", "/scratch", "/proc", "/etc", "/dev", "/packages"):
    for folder, folders, files in os.walk(top):
        seen += [folder + "/" + name for name in files + folders if name == "canary"]
tell(seen=seen, mounts=[line.split()[4] for line in open("/proc/self/mountinfo")])
""",
            data={"ours": b"y"},
        )
    assert ran.outcome.kind == "finished", ran.outcome.log
    assert ran.said["seen"] == []
    assert "/data" not in ran.said["mounts"], "data is part of the read-only root, which is this sandbox's own"


def test_processes_of_others(attack: Attacker) -> None:
    ran = attack(
        f"""
import signal
attempt("kill the site", lambda: os.kill({os.getpid()}, signal.SIGKILL))
attempt("signal the site", lambda: os.kill({os.getpid()}, 0))
attempt("open the site", lambda: os.pidfd_open({os.getpid()}))
for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGSTOP, signal.SIGSEGV):
    os.kill(1, number)
for name in ("environ", "mem", "maps", "fd", "cwd", "root", "exe", "stack", "syscall"):
    attempt(name, lambda: (os.listdir if name == "fd" else open if name not in ("cwd", "root", "exe") else os.readlink)(
        "/proc/1/" + name) and "open")
attempt("write 1", lambda: open("/proc/1/mem", "r+b") and "open")
attempt("attach", lambda: call("ptrace", 16, 1, 0, 0))
attempt("traceme", lambda: call("ptrace", 0, 0, 0, 0))
attempt("read memory", lambda: call("process_vm_readv", 1, 0, 0, 0, 0, 0))
attempt("write memory", lambda: call("process_vm_writev", 1, 0, 0, 0, 0, 0))
attempt("oom", lambda: open("/proc/1/oom_score_adj", "w").write("1000"))
tell()
"""
    )
    assert ran.outcome.kind == "finished", ran.outcome.log
    assert {ran.said.pop(name) for name in ("kill the site", "signal the site", "open the site")} == {"ESRCH"}
    assert set(ran.said.values()) <= {"EACCES", "EPERM"}, ran.said


def test_signals_to_everybody_stay_inside(attack: Attacker) -> None:
    """kill(-1) reaches neither the site nor the reaper, and what it reaches is its own."""
    ran = attack(
        "import signal, time\nif os.fork() == 0:\n    time.sleep(60)\nos.kill(-1, signal.SIGKILL)\ntell(alive=True)"
    )
    assert ran.said == {"alive": True}
    assert ran.outcome.kind == "finished"


def test_forbidden_calls(attack: Attacker) -> None:
    """Every one of them, called bare: EPERM before the kernel looks at an argument."""
    ran = attack(
        """
for name in open("/data/forbidden").read().split():
    if name in numbers:
        attempt(name, lambda: call(name, 0, 0, 0, 0, 0, 0))
tell()
""",
        data={"forbidden": " ".join(FORBIDDEN).encode()},
    )
    assert ran.outcome.kind == "finished", ran.outcome.log
    assert {name: said for name, said in ran.said.items() if said != "EPERM"} == {}
    for name in ("mount", "ptrace", "io_uring_setup", "add_key", "keyctl", "bpf", "userfaultfd", "unshare", "setns"):
        assert ran.said[name] == "EPERM"


@pytest.mark.parametrize("devices", [False, True], ids=["CPU", "GPU"])
def test_arguments_of_allowed_calls(attack: Attacker, devices: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU's filter too, under which all of its drivers' ioctls are allowed."""
    monkeypatch.setattr("fl.guard.sandbox.launch_filter", lambda **_: launch_filter(devices=devices))
    ran = attack(
        """
import resource, signal
for name, flag in (("user", 0x10000000), ("net", 0x40000000), ("pid", 0x20000000), ("mount", 0x00020000)):
    attempt("clone " + name, lambda: call("clone", flag | 17, 0, 0, 0, 0))
attempt("watch a folder", lambda: call("fcntl", os.open("/bundle", os.O_RDONLY), 1026 | 1 << 32, 2))
attempt("clone3", lambda: call("clone3", 0, 0))
attempt("no such call", lambda: call(9999))
attempt("type into a terminal", lambda: call("ioctl", 0, 0x5412, ctypes.c_char_p(b"x")))
attempt("type, upper half set", lambda: call("ioctl", 0, 0x5412 | 1 << 32, ctypes.c_char_p(b"x")))
attempt("paste into a terminal", lambda: call("ioctl", 0, 0x541C, ctypes.c_char_p(b"x")))
attempt("another filter", lambda: call("prctl", 22, 2, 0))
attempt("another filter by seccomp", lambda: call("seccomp", 1, 0, 0))
attempt("dumpable", lambda: call("prctl", 4, 1))
attempt("map", lambda: call("prctl", 35, 1, 0))
attempt("socket filter", lambda: socket.socket(socket.AF_UNIX).setsockopt(1, 26, b"x" * 16))
attempt("limit", lambda: call("prlimit64", 0, resource.RLIMIT_CORE, ctypes.create_string_buffer(16), 0))
tell(pair=bool(socket.socketpair()), terminal=os.isatty(0), limit_is=resource.getrlimit(resource.RLIMIT_CORE))
"""
    )
    assert ran.outcome.kind == "finished", ran.outcome.log
    assert ran.said.pop("pair") is True
    assert ran.said.pop("terminal") is False
    assert ran.said.pop("limit_is") == [1, 1]
    assert set(ran.said.values()) <= {"ENOSYS", "EPERM"}, ran.said


@needs_x86
@pytest.mark.parametrize("code", ["b814000000cd80c3", "b827000040 0f05 c3".replace(" ", "")], ids=["int80", "x32"])
def test_other_call_tables_kill(attack: Attacker, code: str) -> None:
    """getpid by the 32-bit table (int 0x80) and by x32's numbers: the filter knows one architecture only."""
    ran = attack(
        f"""
import mmap
page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
page.write(bytes.fromhex("{code}"))
tell(ready=True)
tell(pid=ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))())
"""
    )
    assert ran.said == {"ready": True}
    assert (ran.outcome.kind, ran.outcome.exit_status) == ("signal", 128 + 31)
    assert "SIGSYS" in ran.outcome.sentence


def test_nothing_can_be_executed(attack: Attacker) -> None:
    ran = attack(
        """
import subprocess
attempt("interpreter", lambda: os.execv(os.path.realpath("/proc/self/exe"), ["python"]))
attempt("subprocess", lambda: subprocess.run([os.path.realpath("/proc/self/exe"), "-c", "1"]))
attempt("shell", lambda: os.execv("/bin/sh", ["sh"]))
copy = os.open("/scratch/program", os.O_CREAT | os.O_RDWR, 0o755)
os.write(copy, open("/proc/self/exe", "rb").read())
os.close(copy)
os.chmod("/scratch/program", 0o4755)
attempt("scratch", lambda: os.execv("/scratch/program", ["python"]))
attempt("loader", lambda: os.execv("/lib64/ld-linux-x86-64.so.2", ["ld", "/scratch/program"]))
held = os.memfd_create("program")
os.write(held, open("/proc/self/exe", "rb").read())
attempt("memory file", lambda: os.execve(held, ["python"], {}))
attempt("execveat", lambda: call("execveat", held, ctypes.c_char_p(b""), 0, 0, 0x1000))
flags = {line.split()[4]: line.split()[5] for line in open("/proc/self/mountinfo")}
tell(may=[place for place, options in flags.items() if "nosuid" not in options])
"""
    )
    assert ran.outcome.kind == "finished", ran.outcome.log
    assert ran.said.pop("may") == [], "every mount is nosuid"
    assert set(ran.said.values()) == {"EPERM"}, ran.said


def test_nothing_handed_in_can_be_changed(attack: Attacker) -> None:
    ran = attack(
        """
import sys
site = next(path for path in sys.path if "site" in path)
for path in ("/bundle/client.py", "/data/train", "/packages/fl/__init__.py", "/bootstrap.py", "/etc/passwd",
             "/proc/version"):
    attempt("write " + path, lambda: open(path, "r+b") and "open")
    attempt("chmod " + path, lambda: os.chmod(path, 0o777))
    attempt("unlink " + path, lambda: os.unlink(path))
    attempt("rename " + path, lambda: os.rename(path, path + "x"))
    attempt("truncate " + path, lambda: os.truncate(path, 0))
    attempt("link " + path, lambda: os.link(path, "/scratch/link"))
    reading = os.open(path, os.O_RDONLY)
    attempt("reopen " + path, lambda: os.open(f"/proc/self/fd/{reading}", os.O_RDWR))
for folder in ("/", "/bundle", "/data", "/packages", "/packages/fl", site, "/usr/lib", "/etc", "/dev", "/proc"):
    attempt("create in " + folder, lambda: open(folder + "/new", "w") and "open")
    attempt("mkdir in " + folder, lambda: os.mkdir(folder + "/new"))
    attempt("symlink in " + folder, lambda: os.symlink("/scratch", folder + "/new"))
    attempt("mkfifo in " + folder, lambda: os.mkfifo(folder + "/new"))
tell()
""",
        data={"train": b"1"},
    )
    assert ran.outcome.kind == "finished", ran.outcome.log
    assert set(ran.said.values()) <= {"EROFS", "EACCES", "EPERM", "EXDEV", "ENOENT"}, ran.said
    assert ran.said["write /data/train"] in ("EROFS", "EACCES")


def test_links_out_of_scratch_lead_nowhere(attack: Attacker, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("host")
    ran = attack(
        f"""
os.symlink({str(tmp_path / "target")!r}, "target")
os.symlink("/proc/1/root", "root")
os.symlink("/proc/1/cwd", "cwd")
attempt("symlink", lambda: open("target").read())
attempt("root", lambda: os.listdir("root"))
attempt("cwd", lambda: os.listdir("cwd"))
attempt("device", lambda: os.mknod("disk", 0o60666, os.makedev(254, 0)))
attempt("character device", lambda: os.mknod("mem", 0o20666, os.makedev(1, 1)))
attempt("handle", lambda: call("open_by_handle_at", 3, ctypes.create_string_buffer(64), 0))
attempt("channel is no folder", lambda: os.fchdir(3))
tell()
"""
    )
    assert ran.said == {
        "symlink": "ENOENT",
        "root": "EACCES",
        "cwd": "EACCES",
        "device": "EPERM",
        "character device": "EPERM",
        "handle": "EPERM",
        "channel is no folder": "ENOTDIR",
    }


def test_nothing_is_inherited(attack: Attacker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even descriptors that the site left inheritable, nor its environment."""
    monkeypatch.setenv("SEALWRIGHT_CANARY", "canary-in-the-environment")
    secret = tmp_path / "secret"
    secret.write_text("canary-in-a-file")
    with secret.open() as file, socket.socket() as listening:
        os.set_inheritable(file.fileno(), True)
        listening.set_inheritable(True)
        ran = attack(
            """
listing = os.open("/proc/self/fd", os.O_RDONLY)
descriptors = sorted(int(name) for name in os.listdir(listing))
own = open("/proc/self/environ", "rb").read().decode()
tell(descriptors=[d for d in descriptors if d != listing], environment=dict(os.environ), initial=own,
     kinds=[os.readlink(f"/proc/self/fd/{d}").split(":")[0] for d in (0, 1, 2, 3)],
     command=open("/proc/1/cmdline").read())
"""
        )
    assert ran.outcome.kind == "finished", ran.outcome.log
    descriptors = ran.said["descriptors"]
    assert [d for d in descriptors if d < 4] == [0, 1, 2, 3]
    assert len(descriptors) <= 5, "one more is the listing's own"
    assert ran.said["kinds"] == ["/dev/null", "pipe", "pipe", "socket"]
    assert set(ran.said["environment"]) <= {"HOME", "LANG", "PWD", "SEAL_CHANNEL", "TMPDIR", "TZ", "USER"}
    for text in (ran.said["initial"], ran.said["command"]):
        assert "canary" not in text
        assert str(Path.cwd()) not in text


def test_crashes_leave_no_core(attack: Attacker) -> None:
    """A limit of 1, not 0: with 0 the kernel would still run a core handler behind a pipe."""
    ran = attack(
        """
import resource, signal
child = os.fork()
if child == 0:
    signal.raise_signal(signal.SIGSEGV)
_, status = os.waitpid(child, 0)
attempt("lower", lambda: call("setrlimit", resource.RLIMIT_CORE, ctypes.create_string_buffer(16)))
try:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    found["python"] = "allowed"
except (OSError, ValueError) as error:
    found["python"] = "refused"
tell(signal=os.WTERMSIG(status), core=os.WCOREDUMP(status), files=sorted(os.listdir(".")))
"""
    )
    assert ran.said == {"lower": "EPERM", "python": "refused", "signal": 11, "core": False, "files": ["shm", "tmp"]}


def test_nothing_is_left_on_the_host(attack: Attacker) -> None:
    """Files, shared memory, message queues: what a script leaves is gone with its sandbox."""
    name = f"sealwright-left-{os.getpid()}"
    ran = attack(
        f"""
import _posixshmem
for folder in ("/tmp", "/scratch", "/dev/shm", "/var/tmp", "/run"):
    attempt(folder, lambda: open(folder + "/{name}", "w").write("x"))
attempt("shared memory", lambda: _posixshmem.shm_open("/{name}2", os.O_CREAT | os.O_RDWR, mode=0o600) and "made")
tell()
"""
    )
    said = ran.said
    for place, came in {"/tmp": 1, "/scratch": 1, "/dev/shm": 1, "shared memory": "made"}.items():  # noqa: S108
        assert said[place] == came
    assert {said["/var/tmp"], said["/run"]} == {"ENOENT"}  # noqa: S108
    for folder in ("/tmp", "/dev/shm", "/var/tmp", "/run"):  # noqa: S108
        assert not list(Path(folder).glob(f"{name}*"))
