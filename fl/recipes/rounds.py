"""The rounds of a job: where they begin, how each is judged, what is kept of it, and when they end.

A round's metrics, which scripts measure before they train, are about the model that the sites received in it. So the
best model is the one that was handed out in the round with the best mean; the last model, which nobody has received,
is judged by an evaluation (`fl.recipes.evaluation`) or not at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from fl.jobs.progress import JobEvent
from fl.jobs.settings import JobSettings
from fl.server.federation import Federation, Saved
from fl.transport.stored import Stored

if TYPE_CHECKING:
    import numpy.typing as npt


class Rounds:
    """Iterate over it for the rounds to run; `end` ends each.

    Where the federation's keeper knows of an earlier run, the rounds go on after its last whole one, from its model.
    """

    def __init__(self, sites: Federation, settings: JobSettings, model: Stored) -> None:
        """`model` is the first one; it is closed if an earlier run's takes its place."""
        self._sites = sites
        self._settings = settings
        self._best: float | None = None
        self._since = 0
        self._over = False
        self._first = 0
        self.model = model
        """The model from which the rounds start."""
        self.state: Mapping[str, npt.NDArray[Any]] = {}
        """What the algorithm kept in an earlier run; empty if there was none."""
        saved = sites.keeper.saved() if sites.keeper is not None else None
        if saved is not None:
            model.close()
            self.model, self.state, self._first = saved.model, saved.state, saved.round
            self._best = saved.judged.get("best")
            self._since = int(saved.judged.get("since", 0))

    @property
    def resumed(self) -> bool:
        """Whether these rounds go on where an earlier run stopped."""
        return self._first > 0

    def __iter__(self) -> Iterator[int]:
        for round_ in range(self._first, self._settings.num_rounds):
            yield round_
            if self._over:
                return

    def end(
        self,
        round_: int,
        metrics: Mapping[str, float],
        *,
        received: Stored,
        following: Stored,
        state: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        """The round is done: the sites received `received`, of which came `metrics`, and the next gets `following`.

        `state` is what the algorithm needs beside the model to go on. The memories stay the caller's.
        """
        self._sites.observe(JobEvent(kind="aggregated", round=round_, values=dict(metrics)))
        selection = self._settings.selection
        value = None if selection is None else metrics.get(selection.metric)
        if selection is not None and value is not None:
            self._since += 1
            if selection.better(value, self._best):
                self._best, self._since = value, 0
                if self._sites.best is not None:
                    self._sites.best.close()
                self._sites.best = received.share()
                self._sites.observe(JobEvent(kind="best", round=round_, values={selection.metric: value}))
            self._over = selection.reached(value) or (
                selection.patience is not None and self._since >= selection.patience
            )
        if self._sites.keeper is not None:
            judged = {} if self._best is None else {"best": self._best, "since": float(self._since)}
            self._sites.keeper.save(Saved(round_ + 1, following, dict(state or {}), judged))
