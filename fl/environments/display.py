"""A job's live progress in a terminal or a notebook; nothing at all where there is neither."""

from __future__ import annotations

import io
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from fl.jobs.progress import JobEvent

if TYPE_CHECKING:
    from rich.live import Live
    from rich.table import Table


def in_notebook() -> bool:
    """Whether this code runs in a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and type(shell).__name__ == "ZMQInteractiveShell"


class Page:
    """One output of a notebook that is written anew."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, table: Table) -> None:
        """Show `table` in the place of what was shown last."""
        from IPython.display import HTML, display
        from rich.console import Console

        console = Console(file=io.StringIO(), record=True, width=100)
        console.print(table)
        page = HTML(console.export_html(inline_styles=True, code_format="<pre>{code}</pre>"))
        if self._handle is None:
            self._handle = display(page, display_id=True)
        else:
            self._handle.update(page)


class Display:
    """Shows rounds, sites and mean metrics while a job runs."""

    def __init__(self, name: str, num_rounds: int, stream: TextIO, *, shown: bool = True) -> None:
        """`shown` False: nothing is shown, whatever `stream` is."""
        self._shown = shown
        self._page: Page | None = None
        self._name = name
        self._num_rounds = num_rounds
        self._stream = stream
        self._live: Live | None = None
        self._round: int | None = None
        self._sites: dict[str, str] = {}
        self._metrics: list[tuple[int, dict[str, float]]] = []

    def observe(self, event: JobEvent) -> None:
        """Take one event into account."""
        if event.kind == "round":
            self._round = event.round
            self._sites = {
                name: state if state.startswith("[red]") else "training" for name, state in self._sites.items()
            }
        elif event.kind == "joined" and event.site:
            self._sites[event.site] = "joined"
        elif event.kind == "update" and event.site:
            self._sites[event.site] = "sent its update"
        elif event.kind in {"paused", "resumed"} and event.site:
            self._sites[event.site] = event.kind
        elif event.kind in {"lost", "refused"} and event.site:
            from rich.markup import escape

            self._sites[event.site] = f"[red]{event.kind}[/red]: {escape(event.text)}"
        elif event.kind == "aggregated" and event.round is not None:
            self._metrics.append((event.round, event.values))
        if event.kind == "value":
            return
        if self._live is not None:
            self._live.update(self._render())
        elif self._page is not None:
            self._page.show(self._render())

    @property
    def live(self) -> bool:
        """Whether there is a terminal or a notebook that shows the progress."""
        return self._live is not None or self._page is not None

    def _render(self) -> Table:
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=self._name, title_justify="left")
        table.add_column("round")
        table.add_column("mean metrics")
        for round_, values in self._metrics[-8:]:
            words = ", ".join(f"{name} {value:.4g}" for name, value in list(values.items())[:6])
            table.add_row(f"{round_ + 1} of {self._num_rounds}", escape(words) or "-")
        if self._round is not None and self._round >= len(self._metrics):
            sites = "\n".join(f"{name}: {state}" for name, state in list(self._sites.items())[:20])
            table.add_row(f"{self._round + 1} of {self._num_rounds}", sites)
        return table

    def __enter__(self) -> Self:
        if not self._shown:
            return self
        if in_notebook():
            self._page = Page()
            self._page.show(self._render())
        elif self._stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(self._render(), console=Console(file=self._stream), refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
