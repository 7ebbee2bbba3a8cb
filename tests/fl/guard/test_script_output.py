"""What becomes of a script's output: its head and end are kept, and only the place of a failure is told."""

from __future__ import annotations

import ctypes.util
import re
import subprocess
import sys

import pytest
from hostile_scripts import Attacker
from hypothesis import given
from hypothesis import strategies as st

from fl.guard.failure_place import failure_place
from fl.guard.kept_output import KeptOutput

FILES = {"client.py": b"import model\n\nmodel.load()\n", "model.py": b"def load():\n    raise KeyError('Jane Roe')\n"}
TOLD = re.compile(r"[A-Z][A-Za-z]+|([A-Z][A-Za-z]+ at )?(client|model)\.py, line [1-4]")


def real_traceback(text: str) -> bytes:
    """What Python prints about a script that is called as it is in a sandbox."""
    code = f"exec(compile({text!r}, '/bundle/client.py', 'exec'))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, check=False)
    return done.stderr


def test_an_exception_is_told_by_its_kind_and_place() -> None:
    assert (
        failure_place(real_traceback("x = 1\nraise ValueError('Jane Roe')\n"), FILES)
        == "ValueError at client.py, line 2"
    )
    missing = real_traceback("import no_such_module\n")
    assert failure_place(missing, FILES) == "ModuleNotFoundError at client.py, line 1"


def test_of_several_tracebacks_the_last_is_told() -> None:
    chained = real_traceback("try:\n    {}['Jane Roe']\nexcept KeyError:\n    raise OSError(5, 'Jane Roe')\n")
    assert chained.count(b"Traceback") == 2
    files = {"client.py": b"\n" * 8}
    assert failure_place(b"much output\n" * 99 + chained, files) == "OSError at client.py, line 4"


@pytest.mark.parametrize(
    "printed",
    [
        b"",
        b"Jane Roe\n",
        b"ValueError: Jane Roe\n",
        b'Traceback (most recent call last):\n  File "/bundle/Jane Roe", line 1\nJaneRoe\n',
        b'Traceback (most recent call last):\n  File "/bundle/client.py", line 1234567\nJaneRoeError: x\n',
        b'Traceback (most recent call last):\n  File "/bundle/client.py", line 0\n',
        b'Traceback (most recent call last):\n  File "/data/client.py", line 1\n',
    ],
)
def test_a_false_traceback_says_nothing(printed: bytes) -> None:
    assert failure_place(printed, FILES) is None


@given(
    st.lists(
        st.sampled_from(
            [
                "Traceback (most recent call last):\n",
                '  File "/bundle/client.py", line ',
                '  File "/bundle/',
                "1\n",
                "ValueError",
                "\n",
            ]
        )
        | st.text(max_size=20),
        max_size=12,
    )
)
def test_whatever_a_script_prints_only_short_lists_are_told(pieces: list[str]) -> None:
    told = failure_place("".join(pieces).encode(errors="surrogateescape"), FILES)
    assert told is None or TOLD.fullmatch(told), told


@given(st.lists(st.binary(max_size=40), max_size=20), st.integers(0, 64))
def test_head_and_end_are_kept_within_the_bound(pieces: list[bytes], limit: int) -> None:
    kept = KeptOutput(limit)
    for piece in pieces:
        kept.take(piece)
    whole = b"".join(pieces)
    assert len(bytes(kept)) == min(limit, len(whole))
    assert kept.truncated == (len(whole) > limit)
    if kept.truncated:
        head = limit - limit // 4
        assert bytes(kept) == whole[:head] + whole[len(whole) - limit // 4 :]
    else:
        assert bytes(kept) == whole


def test_a_traceback_behind_a_flood_of_output_is_kept(attack: Attacker) -> None:
    ran = attack("for number in range(20000): print(number)\nraise KeyError('last')")
    assert ran.outcome.kind == "failed"
    assert ran.outcome.log_truncated
    assert failure_place(ran.outcome.log, {"client.py": b"\n" * 9}) == "KeyError at client.py, line 3"


def test_libraries_that_the_system_chose_among_several_are_loaded(attack: Attacker) -> None:
    """Debian's NumPy and torch need BLAS, which they reach by a link in /etc/alternatives."""
    if ctypes.util.find_library("blas") is None:
        pytest.skip("no BLAS is installed (apt-get install libblas3)")
    ran = attack("tell(blas=bool(ctypes.CDLL('libblas.so.3')))")
    assert ran.said == {"blas": True}
