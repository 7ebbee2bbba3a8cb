"""What a person sees while the demonstration runs: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text


@dataclass
class Step:
    """One step of the story: what it does, how long it takes, what came of it."""

    title: str
    began: float
    seconds: float | None = None
    detail: str = ""
    failed: bool = False


class Display:
    """Shows steps on standard error as they run; `seconds()` tells afterwards how long each took."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False)
        self._steps: list[Step] = []
        self._spinner = Spinner("dots")
        self._live = self._console.is_terminal

    def shown(self) -> AbstractContextManager[object]:
        """Show the steps while this context is open."""
        if not self._live:
            return nullcontext()
        # Standard output and error stay themselves: verbs that run meanwhile divert them.
        return Live(
            console=self._console,
            get_renderable=self._table,
            refresh_per_second=10,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    @contextmanager
    def step(self, title: str) -> Iterator[Step]:
        """Show `title` as running until the block ends; what the block leaves in `detail` is shown beside it."""
        step = Step(title, time.monotonic())
        self._steps.append(step)
        try:
            yield step
        except BaseException:
            step.failed = True
            raise
        finally:
            step.seconds = time.monotonic() - step.began
            if not self._live:
                mark = "FAILED" if step.failed else "done"
                self._console.print(f"{mark:>6} {step.seconds:5.1f} s  {step.title}  {step.detail}", soft_wrap=True)

    def seconds(self) -> dict[str, float]:
        """How long each step took, by title, in seconds."""
        return {step.title: round(step.seconds, 2) for step in self._steps if step.seconds is not None}

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 1))
        table.add_column(width=2)
        table.add_column(justify="right", width=7)
        table.add_column(ratio=2)
        table.add_column(ratio=3, overflow="fold", style="dim")
        for step in self._steps:
            running = step.seconds is None
            elapsed = time.monotonic() - step.began if step.seconds is None else step.seconds
            mark = self._spinner if running else Text("✗", "red") if step.failed else Text("✓", "green")
            table.add_row(mark, f"{elapsed:.1f} s", step.title, step.detail)
        return table


def brief(words: str) -> str:
    """The words with long hexadecimal numbers cut short."""
    return re.sub(r"\b([0-9a-f]{8})[0-9a-f]{16,}\b", r"\1…", words)
