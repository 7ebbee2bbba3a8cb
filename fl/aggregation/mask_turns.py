"""A site's steps of secure aggregation, on a thread of their own: keys are exchanged while its script trains."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Literal

from fl.aggregation.mask_talk import MaskingSite, Parts, Step
from policies.errors import SealwrightError


class MaskingTurns:
    """Hears what the server says and answers. After a failure, which is told once, it hears nothing any more."""

    def __init__(
        self,
        site: MaskingSite,
        answer: Callable[[int, Step, str, str], None],
        failed: Callable[[SealwrightError], None],
    ) -> None:
        self.site = site
        self._answer = answer
        self._failed = failed
        self._heard: SimpleQueue[tuple[int, Step, str, bool, str] | Literal["reconnected"] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._take, name="masking", daemon=True)
        self._thread.start()

    def hear(self, round_: int, step: Step, body: str, *, more: bool = False, run: str = "") -> None:
        """The server has said this, or a part of it, in this run. Returns at once."""
        self._heard.put((round_, step, body, more, run))

    def reconnected(self) -> None:
        """What follows is said on another connection: a message that has not come whole comes anew."""
        self._heard.put("reconnected")

    def close(self) -> None:
        """The job is over; whoever waits for masks waits no more."""
        self._heard.put(None)
        self.site.close()

    def _take(self) -> None:
        parts = Parts()
        while (said := self._heard.get()) is not None:
            if said == "reconnected":
                parts = Parts()
                continue
            round_, step, piece, more, run = said
            try:
                body = parts.add(piece, more=more)
                if body is None:
                    continue
                answer = self.site.hear(round_, step, body, run)
                if step == "dealt":  # which nobody waits for
                    self.site.prepare()
                else:
                    self._answer(round_, step, answer, run)
            except SealwrightError as error:
                self.site.close()
                self._failed(error)
                return
