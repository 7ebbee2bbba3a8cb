"""Where a sandbox's control group is made: from the kernel's own tables, and in a real delegated v2 group."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fl.guard.control_groups import hierarchies

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
V1_MEMORY = "33 30 0:29 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
V1_CPU = "34 30 0:30 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
NAMED = "35 30 0:31 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n"
HYBRID = "36 30 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
ROOT = "23 1 254:0 / / rw - ext4 /dev/vda rw\n"


@pytest.mark.parametrize(
    ("mountinfo", "membership", "expected"),
    [
        (ROOT + V2, "0::/\n", {"": ("v2", "/sys/fs/cgroup")}),
        (ROOT + V2, "0::/user.slice/x.scope\n", {"": ("v2", "/sys/fs/cgroup/user.slice/x.scope")}),
        (
            ROOT + V1_MEMORY + V1_CPU + NAMED + HYBRID,
            "5:cpu,cpuacct:/a\n4:memory:/a/b\n1:name=systemd:/\n0::/c\n",
            {
                "memory": ("v1", "/sys/fs/cgroup/memory/a/b"),
                "cpu": ("v1", "/sys/fs/cgroup/cpu,cpuacct/a"),
                "": ("v2", "/sys/fs/cgroup/unified/c"),
            },
        ),
        # A container: the mount shows the hierarchy from its own group on.
        (
            "40 1 0:29 /docker/1234 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n",
            "4:memory:/docker/1234/x\n",
            {"memory": ("v1", "/sys/fs/cgroup/memory/x")},
        ),
        # A group outside what the mount shows is out of reach.
        ("40 1 0:29 /docker/1234 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n", "4:memory:/\n", {}),
        (ROOT + V2, "0::/../../elsewhere\n", {}),
        ("30 23 0:26 / /mnt/a\\040b rw shared:9 master:1 - cgroup2 none rw\n", "0::/\n", {"": ("v2", "/mnt/a b")}),
        (ROOT, "", {}),
    ],
)
def test_hierarchies(mountinfo: str, membership: str, expected: dict[str, tuple[str, str]]) -> None:
    found = hierarchies(mountinfo, membership)
    assert {name: (place.version, str(place.own)) for name, place in found.items()} == expected


SITE = """
import os, sys
from pathlib import Path
from fl.guard import control_groups
own = Path(sys.argv[1])
(own / "cgroup.procs").write_text("0")
control_groups.CONTROLLERS = (sys.argv[2],)
first = control_groups._delegate(own)
print(first[0] == own, sorted(first[1]), first[2])
tables = Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text()
now = control_groups.hierarchies(*tables)[""].own
print(now == own / control_groups.OWN_PROCESSES)
print(control_groups._delegate(now) == first)
child = own / "child"
child.mkdir()
print(sys.argv[2] in (child / "cgroup.controllers").read_text())
child.rmdir()
"""


def test_a_delegated_v2_group_hands_its_controllers_on() -> None:
    """On the real kernel: the site moves into a leaf, once, and groups made beside it have the controllers."""
    found = hierarchies(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text()).get("")
    if found is None:
        pytest.skip("cgroup v2 is not mounted here")
    offered = (found.own / "cgroup.controllers").read_text().split()
    control = found.own / "cgroup.subtree_control"
    if not offered or not os.access(control, os.W_OK) or (found.own / "cgroup.type").exists():
        pytest.skip("this process is not at the root of a writable cgroup v2 hierarchy with a controller")
    before = control.read_text().split()
    group = found.own / f"sealwright-test-{os.getpid()}"
    group.mkdir()
    try:
        control.write_text(f"+{offered[0]}")
        ran = subprocess.run(
            [sys.executable, "-c", SITE, str(group), offered[0]],
            cwd=Path(__file__).resolve().parents[3],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
        assert ran.stdout == f"True ['{offered[0]}'] \nTrue\nTrue\nTrue\n", ran.stderr
    finally:
        for leaf in (group / "child", group / "sealwright-site", group):
            if leaf.exists():
                leaf.rmdir()
        if offered[0] not in before:
            control.write_text(f"-{offered[0]}")


def test_a_shared_v2_group_is_left_alone(tmp_path: Path) -> None:
    """Somebody else's process in our group: it is not ours to move, and the reason is said."""
    from fl.guard.control_groups import _delegate

    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    (tmp_path / "cgroup.subtree_control").write_text("\n")
    (tmp_path / "cgroup.type").write_text("domain\n")
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n1\n")
    parent, offered, why = _delegate(tmp_path)
    assert (parent, offered) == (None, frozenset())
    assert "Delegate=yes" in why
    assert (tmp_path / "cgroup.subtree_control").read_text() == "\n"
