"""What evaluated versions mean for a job: which is the best so far, and whether it is good enough to end. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from fl.jobs.settings import Selection


class Judgement:
    """Of one job's versions, in their order."""

    def __init__(self, selection: Selection | None, saved: Mapping[str, float] | None = None) -> None:
        """`saved`: what `saved` was when the job stood still; None: it begins."""
        self._selection = selection
        self._best = (saved or {}).get("best")
        self._since = int((saved or {}).get("since", 0))
        self.over: str | None = None
        """Why the job ends with the version that was judged last."""

    def take(self, value: float) -> bool:
        """A version's metric; whether it is the best so far."""
        selection = self._selection
        if selection is None:
            return False
        self._since += 1
        better = selection.better(value, self._best)
        if better:
            self._best, self._since = value, 0
        if selection.reached(value):
            self.over = f"the {selection.metric} of {value:.4g} is reached"
        elif selection.patience is not None and self._since >= selection.patience:
            self.over = f"{self._since} evaluations without a better one"
        return better

    @property
    def saved(self) -> dict[str, float]:
        """What it takes to go on."""
        return {} if self._best is None else {"best": self._best, "since": float(self._since)}
