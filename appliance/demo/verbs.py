"""The verbs of `seal` that the demonstration runs, each with the words that an operator would type, in this process."""

from __future__ import annotations

import io
import shlex
import threading
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from typer import Exit
from typer.main import get_command

from appliance.cli import app
from policies.decisions import end_idle_evaluators
from policies.errors import Refused

TRANSCRIPT: Final = "commands.sh"
"""In the demonstration's folder: every command line, in order, with paths from that folder."""
LAST_VERB_SECONDS: Final = 30.0


@dataclass
class Verbs:
    """Runs verbs one at a time and writes each down. `close` ends that; what is called afterwards is refused."""

    folder: Path
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _closed: bool = False

    def __call__(self, *words: object) -> str:
        """Run `seal WORDS…`; return what it printed on standard output.

        Raises what the verb raises, and Refused if it ends with another status than 0.
        """
        argv = [str(word) for word in words]
        self.note(["seal", *argv])
        out, err = io.StringIO(), io.StringIO()
        with self._lock:
            if self._closed:
                raise Refused("the demonstration has ended", where=" ".join(argv[:2]), do="Start it again.")
            try:
                with redirect_stdout(out), redirect_stderr(err):
                    status = _run(argv)
            finally:
                end_idle_evaluators()  # a verb that is a process of its own leaves none behind either
        if status != 0:
            said = (out.getvalue() + err.getvalue()).strip()
            raise Refused(f"seal {' '.join(argv[:2])} ended with {status}: {said}", where=argv[0], do="Read why.")
        return out.getvalue()

    def note(self, argv: list[str]) -> None:
        """Write a command line down."""
        line = shlex.join(argv).replace(f"{self.folder}/", "")
        with (self.folder / TRANSCRIPT).open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def close(self) -> None:
        """Let a running verb end, and none begin: standard output and error are the caller's again."""
        self._closed = True
        if self._lock.acquire(timeout=LAST_VERB_SECONDS):
            self._lock.release()


def _run(argv: list[str]) -> int:
    try:
        result: Any = get_command(app).main(args=argv, prog_name="seal", standalone_mode=False)
    except Exit as stop:
        return int(stop.exit_code)
    return result if isinstance(result, int) else 0
