"""A `docker save` archive becomes files below one folder, whatever names a stranger has written into it."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cvm_image.build.contained import command_of
from cvm_image.build.container import lock_container, take_container, unpack_container
from cvm_image.build.errors import MissingInput, UnusableRecipe
from cvm_image.build.store import Store

Entry = tuple[str, object]
"""A member of a layer: name, and bytes (a file), None (a folder), or a function that changes its header."""


def layer(*entries: Entry) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, what in entries:
            info = tarfile.TarInfo(name)
            info.mode = 0o755
            if what is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(what, bytes):
                info.size = len(what)
            elif callable(what):
                what(info)
            tar.addfile(info, io.BytesIO(what) if isinstance(what, bytes) else None)
    return raw.getvalue()


def link(target: str, *, hard: bool = False) -> Callable[[tarfile.TarInfo], None]:
    def change(info: tarfile.TarInfo) -> None:
        info.type = tarfile.LNKTYPE if hard else tarfile.SYMTYPE
        info.linkname = target

    return change


def device(info: tarfile.TarInfo) -> None:
    info.type = tarfile.CHRTYPE


def saved(
    path: Path,
    layers: Sequence[bytes],
    *,
    digests: Sequence[bytes] | None = None,
    packed: bool = False,
    copies: int = 1,
    **config: object,
) -> Path:
    """Write what `docker save` writes for an image of these layers."""
    configuration = {
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Entrypoint": ["/bin/busybox"],
            "Cmd": ["echo", "hello"],
            "Env": ["NAME=value"],
            "Labels": {"a": "b"},
        },
        "rootfs": {
            "type": "layers",
            "diff_ids": [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in digests or layers],
        },
        **config,
    }
    files = {f"blobs/sha256/{number}": gzip.compress(one) if packed else one for number, one in enumerate(layers)}
    image = {"Config": "config.json", "RepoTags": ["tool:1"], "Layers": list(files)}
    files |= {"config.json": json.dumps(configuration).encode(), "manifest.json": json.dumps([image] * copies).encode()}
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def names(root: Path) -> list[str]:
    return sorted(
        str(path.relative_to(root)) for path in root.rglob("*") if path.name not in {"tmp", "run", "dev", "proc"}
    )


@pytest.mark.parametrize("packed", [False, True])
def test_layers_are_applied_in_order_with_what_they_take_away(tmp_path: Path, packed: bool) -> None:
    first = layer(("app", None), ("app/old", b"1"), ("app/kept", b"2"), ("gone", None), ("gone/a", b"3"))
    second = layer(("app/.wh.old", b""), ("gone/.wh..wh..opq", b""), ("gone/b", b"4"), ("link", link("app/kept")))
    third = layer(("app/kept", b"5"), ("hard", link("app/kept", hard=True)))
    start = unpack_container(saved(tmp_path / "a.tar", [first, second, third], packed=packed), tmp_path / "out")
    root = tmp_path / "out" / "root"
    assert names(root) == ["app", "app/kept", "gone", "gone/b", "hard", "link", "var"]
    assert (root / "hard").read_bytes() == b"5"
    assert (start.argv, start.env, start.cwd) == (["/bin/busybox", "echo", "hello"], ["NAME=value"], "/")
    assert json.loads((tmp_path / "out" / "start.json").read_bytes())["argv"] == start.argv


def test_rights_to_become_another_are_dropped(tmp_path: Path) -> None:
    def set_id(info: tarfile.TarInfo) -> None:
        info.mode = 0o6757

    unpack_container(saved(tmp_path / "a.tar", [layer(("su", set_id))]), tmp_path / "out")
    assert (tmp_path / "out/root/su").stat().st_mode & 0o7777 == 0o755


@pytest.mark.parametrize(
    "entries",
    [
        [("../outside", b"x")],
        [("/outside", b"x")],
        [("a/../../outside", b"x")],
        [("a", link("../..")), ("a/outside", b"x")],
        [("a", link("/")), ("b", link("a/../..")), ("b/outside", b"x")],
        [("outside-file", link("../../outside")), ("outside-file", b"x")],
        [("a", link("../../outside", hard=True))],
        [("s", link("/etc/passwd")), ("h", link("s", hard=True)), ("h", b"x")],
        [("a", link("b")), ("b", link("a")), ("a/x", b"x")],
        [("tty", device)],
        [(".wh...", b"")],
        [("file", b"x"), ("file/below", b"x")],
    ],
)
def test_no_name_leads_out_of_the_folder(tmp_path: Path, entries: list[Entry]) -> None:
    (tmp_path / "outside").write_bytes(b"untouched")
    archive = saved(tmp_path / "a.tar", [layer(*entries)])
    with contextlib.suppress(UnusableRecipe):
        unpack_container(archive, tmp_path / "deep" / "out")
    assert (tmp_path / "outside").read_bytes() == b"untouched"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar", "deep", "outside"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"digests": [b"another"]}, "another digest"),
        ({"architecture": "arm64"}, "linux/arm64"),
        ({"copies": 2}, "several images"),
        ({"copies": 0}, "several images"),
        ({"config": {}}, "no command"),
        ({"rootfs": {"type": "layers", "diff_ids": ["sha256:0", "sha256:1"]}}, "other layers"),
    ],
)
def test_an_archive_that_is_not_what_it_says_is_refused(tmp_path: Path, change: dict[str, object], words: str) -> None:
    archive = saved(tmp_path / "a.tar", [layer(("a", b"x"))], **change)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(UnusableRecipe, match=words):
        unpack_container(archive, tmp_path / "out")


@settings(max_examples=60)
@given(cut=st.integers(0, 10239), byte=st.integers(0, 255))
def test_a_damaged_archive_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, cut: int, byte: int) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    raw = bytearray(saved(folder / "a.tar", [layer(("a", None), ("a/b", b"x" * 700))]).read_bytes())
    raw[cut % len(raw)] = byte
    (folder / "a.tar").write_bytes(raw)
    try:
        unpack_container(folder / "a.tar", folder / "out")
    except UnusableRecipe:
        pass
    else:
        assert (folder / "out/root/a/b").read_bytes() == b"x" * 700
    shutil.rmtree(folder)


def test_a_container_is_an_input_like_any_other(tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.toml"
    saved(tmp_path / "app.tar", [layer(("a", b"x"))])
    store = Store(tmp_path / "cache")
    locked = lock_container("app.tar", recipe, store)
    (tmp_path / "app.tar").write_bytes(b"another")
    assert take_container(locked, recipe, store) == store.input(locked.sha256)
    store.input(locked.sha256).write_bytes(b"damaged")
    with pytest.raises(MissingInput, match="not the container that was locked"):
        take_container(locked, recipe, store)
    with pytest.raises(UnusableRecipe, match="not there"):
        lock_container("none.tar", recipe, store)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed (appliance/setup.sh bubblewrap)")
def test_its_command_runs_in_its_own_root_alone(tmp_path: Path) -> None:
    program = Path("/usr/bin/python3").resolve()
    libraries = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True).stdout
    entries: list[Entry] = [("probe", program.read_bytes())]
    entries += [(word.lstrip("/"), Path(word).read_bytes()) for word in libraries.split() if word.startswith("/")]
    # an interpreter without its library ends at once, saying which path it looked at: that it was started is enough
    settings = {"Entrypoint": ["/probe", "-I"], "Env": ["NAME=value", "PATH=/bin"]}
    unpack_container(saved(tmp_path / "a.tar", [layer(*entries)], config=settings), tmp_path / "out")
    start = json.loads((tmp_path / "out/start.json").read_bytes())
    line = command_of(tmp_path / "out/root", start)
    assert line[line.index("--ro-bind") + 1 :][:2] == [str(tmp_path / "out/root"), "/"]
    done = subprocess.run(
        ["/usr/bin/bwrap", *line[1:]], env={}, capture_output=True, text=True, timeout=60, check=False
    )
    assert "encodings" in done.stderr, done.stderr
    assert "--clearenv" in line
