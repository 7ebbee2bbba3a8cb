"""The file of a vault's store: whole or of before at any crash, and nobody's but its key's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attestation.errors import StoreRefused
from attestation.fresh_state import (
    FILE,
    MAX_ENTRIES,
    MAX_VALUE,
    Store,
    StoreFile,
    check_entries,
    derive_keys,
    is_authentic,
    store_root,
)
from attestation.vaults import Mark
from policies.errors import Unusable

VAULT = "borealis-hospital/vault-site/north"
KEY = bytes(range(32))
KEYS = derive_keys(VAULT, KEY)
ENTRIES = st.dictionaries(
    st.from_regex(r"[a-z0-9][a-z0-9._-]{0,20}", fullmatch=True), st.binary(max_size=200), max_size=8
)


def file_in(folder: Path) -> StoreFile:
    return StoreFile(folder, VAULT, KEYS)


@given(ENTRIES, st.integers(1, 2**53 - 1))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_written_is_read(tmp_path: Path, entries: dict[str, bytes], generation: int) -> None:
    store = Store(generation, entries)
    file_in(tmp_path).write(store)
    assert file_in(tmp_path).read() == store
    assert is_authentic(VAULT, KEYS, store_root(VAULT, KEYS, store))


@given(st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_bytes_are_refused(tmp_path: Path, data: st.DataObject) -> None:
    file_in(tmp_path).write(Store(3, {"rounds": b"3"}))
    raw = (tmp_path / FILE).read_bytes()
    place = data.draw(st.integers(0, len(raw) - 1))
    other = data.draw(
        st.sampled_from(
            (raw[:place], raw + b"\0", raw[:place] + bytes([raw[place] ^ 1 << place % 8]) + raw[place + 1 :], b"")
        )
    )
    (tmp_path / FILE).write_bytes(other)
    with pytest.raises(StoreRefused, match="was changed, or is another vault's"):
        file_in(tmp_path).read()


def test_another_key_and_another_vault_read_nothing(tmp_path: Path) -> None:
    file_in(tmp_path).write(Store(1, {"secret": b"a value that tells"}))
    assert b"a value that tells" not in (tmp_path / FILE).read_bytes()
    other = VAULT.replace("north", "south")
    for vault, keys in ((VAULT, derive_keys(VAULT, KEY[::-1])), (other, KEYS), (other, derive_keys(other, KEY))):
        with pytest.raises(StoreRefused):
            StoreFile(tmp_path, vault, keys).read()
    assert len({KEYS.volume, KEYS.seal, KEYS.root, KEY}) == 4
    assert KEYS.seal.hex() not in repr(KEYS)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert file_in(tmp_path).read() is None
    (tmp_path / "elsewhere").write_bytes(b"x")
    (tmp_path / FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreRefused, match="cannot be read"):
        file_in(tmp_path).read()
    (tmp_path / FILE).unlink()
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(StoreRefused, match="no regular file"):
        file_in(tmp_path).read()
    (tmp_path / FILE).unlink()
    with (tmp_path / FILE).open("wb") as file:
        file.truncate(2**32)
    with pytest.raises(StoreRefused, match="larger than"):
        file_in(tmp_path).read()


def test_a_root_says_one_thing() -> None:
    store = Store(4, {"a": b"1", "b": b"2"})
    root = store_root(VAULT, KEYS, store)
    for other in (
        store_root(VAULT, KEYS, Store(5, store.entries)),
        store_root(VAULT, KEYS, Store(4, {"a": b"1"})),
        store_root(VAULT, KEYS, Store(4, {"a": b"2", "b": b"1"})),
        store_root(VAULT, derive_keys(VAULT, KEY[::-1]), store),
        store_root("cygnus-bio/vault-site/north", KEYS, store),
    ):
        assert other.root[:64] != root.root[:64]
        assert other.root[64:] != root.root[64:]
    assert is_authentic(VAULT, KEYS, root)
    for made_up in (
        Mark(generation=5, root=root.root),
        Mark(generation=4, root="0" * 64 + root.root[64:]),
        Mark(generation=4, root=root.root[:64] + "0" * 64),
        Mark(generation=4, root=""),
    ):
        assert not is_authentic(VAULT, KEYS, made_up)


def test_what_no_store_holds() -> None:
    check_entries({"a": bytes(MAX_VALUE)})
    for entries, why in (
        ({"A": b""}, "no name"),
        ({"../a": b""}, "no name"),
        ({"": b""}, "no name"),
        ({"a": bytes(MAX_VALUE + 1)}, "too large"),
        ({str(n): bytes(MAX_VALUE) for n in range(17)}, "too large"),
        ({str(n): b"" for n in range(MAX_ENTRIES + 1)}, "257 values"),
    ):
        with pytest.raises(Unusable, match=why):
            check_entries(entries)


class Crash(BaseException):
    """The machine stops here."""


def test_a_crash_at_any_step_leaves_one_of_the_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call to the system in turn is the last one; before it is done, and after."""
    before, after = Store(1, {"n": b"1"}), Store(2, {"n": b"2"})
    steps = ((os, "open"), (os, "fdopen"), (os, "fsync"), (Path, "replace"), (Path, "unlink"), (os, "close"))
    seen = set()
    for where, name in steps:
        for nth in range(1, 4):
            for done in (False, True):
                file_in(tmp_path).write(before)
                (tmp_path / f".{FILE}.new").write_bytes(b"left by a crash")
                with monkeypatch.context() as patch:
                    crash_at(patch, where, name, nth, done)
                    try:
                        file_in(tmp_path).write(after)
                    except Crash:
                        crashed = True
                    else:
                        crashed = False
                found = file_in(tmp_path).read()
                assert found in (before, after)
                assert crashed or found == after
                seen.add((crashed, found.generation if found else 0))
    assert seen == {(True, 1), (True, 2), (False, 2)}


def crash_at(patch: pytest.MonkeyPatch, where: Any, name: str, nth: int, done: bool) -> None:
    real: Callable[..., Any] = getattr(where, name)
    calls = 0

    def call(*arguments: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and not done:
            raise Crash
        value = real(*arguments, **more)
        if calls == nth:
            if name == "open":
                os.close(value)
            elif name == "fdopen":
                value.close()
            raise Crash
        return value

    patch.setattr(where, name, call)


WRITER = """
import sys
from pathlib import Path
from attestation.fresh_state import Store, StoreFile, derive_keys
file = StoreFile(Path(sys.argv[1]), sys.argv[2], derive_keys(sys.argv[2], bytes(range(32))))
store = file.read() or Store(0, {})
while True:
    store = Store(store.generation + 1, {"n": str(store.generation + 1).encode() * 1000})
    file.write(store)
    print(store.generation, flush=True)
"""


def test_a_writer_killed_again_and_again(tmp_path: Path) -> None:
    last = 0
    for number in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), VAULT], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        told = int(process.stdout.readline())
        time.sleep(0.01 * number)
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split("\n")
        process.wait(timeout=15)
        process.stdout.close()
        told = max([told, *(int(line) for line in rest[:-1])])
        found = file_in(tmp_path).read()
        assert found is not None
        assert found.generation in (told, told + 1)
        assert found.generation > last
        assert found.entries == {"n": str(found.generation).encode() * 1000}
        last = found.generation
