"""The one way out of a site in a job: everything that its script causes to leave goes through here.

Each round is debited before anything of it leaves, by its declared capacity and in whole: the entry in the ledger says
nothing about what left. What a round's script does then is disclosed (`fl.guard.disclosure`), asked of the charter's
export rules (`fl.guard.export`) and, where the job declares it, held back until the round's release time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from fl.errors import BudgetSpent, OutputRefused, ScriptFailed
from fl.guard.accounting import debited
from fl.guard.disclosure import Disclosure, LoggedLines, LoggedNumbers, Masked, disclose, error_feedback
from fl.guard.export import ExportGate, size_of_numbers
from fl.jobs.bundle import Bundle
from fl.jobs.outputs import capacity
from fl.jobs.record import JobRecord
from fl.jobs.settings import TaskKind
from fl.party import Party
from fl.transport.local import Answer
from fl.transport.memory import SealedMemory
from policies.budgets import EXPORT_KIND, Amount, Export
from policies.errors import Refused, SealwrightError

MAX_REASONS: Final = 64


class SiteExports:
    """What one job may let out of one site. For one thread, but for `stop`."""

    def __init__(
        self,
        party: Party,
        record: JobRecord,
        bundle: Bundle,
        site: str,
        *,
        send_value: Callable[[str, float, int], None],
        send_line: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`send_value` and `send_line` send the server what the script logged; `clock` counts seconds."""
        self._party = party
        self._record = record
        self._bundle = bundle
        self._settings = bundle.settings
        self._outputs = bundle.settings.outputs
        self._site = site
        self._server = ("server", record.server)
        self._gate = ExportGate(party, record, ("site", site))
        self._capacity = capacity(bundle)
        self._values = LoggedNumbers(self._outputs, site)
        self._feedback = error_feedback(bundle.settings)
        self._lines = LoggedLines(self._outputs, site)
        self._held: list[Callable[[], None]] = []
        self._send_value = send_value
        self._send_line = send_line
        self._clock = clock
        self._begun: float | None = None
        self._stopped = threading.Event()
        self._debited = -1

    def begin_job(self) -> None:
        """Debit the first round, and how the job ends, before the script starts. Raises BudgetSpent."""
        self._debit(0, self._capacity.a_round + self._capacity.ending)

    def begin_round(self, round_: int) -> None:
        """Debit a round before it begins. Raises BudgetSpent."""
        if round_ > self._debited:
            self._debit(round_, self._capacity.a_round)
        self._gate.begin_round()
        self._values.begin_round()
        self._lines.begin_round()
        self._held.clear()
        self._begun = self._clock()

    def value(self, key: str, value: float, step: int) -> None:
        """A number that the script logged. Raises OutputRefused, ExportRefused."""
        shown = self._values.disclosed(key, value)
        self._gate.let_out("log", size_of_numbers({key: shown}), self._server)
        self._let_out(partial(self._send_value, key, shown, step))

    def line(self, text: str) -> None:
        """A line of text that the script logged. Raises OutputRefused, ExportRefused."""
        shown = self._lines.disclosed(text)
        self._gate.let_out("log", len(shown), self._server)
        self._let_out(partial(self._send_line, shown))

    def _let_out(self, send: Callable[[], None]) -> None:
        if self._outputs.release_seconds is None:
            send()
        else:
            self._held.append(send)

    def update(
        self,
        answer: Answer,
        raw: SealedMemory,
        model: SealedMemory,
        task: TaskKind = "train",
        masked: Masked | None = None,
    ) -> Disclosure:
        """What leaves of the script's answer to `model`, now, under masks if there are any.

        Raises OutputRefused, ExportRefused, MaskingRefused.
        """
        shown = disclose(
            raw,
            params_type=answer.params_type,
            weight=answer.weight,
            metrics=answer.metrics,
            model=model,
            settings=self._settings,
            site=self._site,
            task=task,
            masked=masked,
            feedback=self._feedback,
        )
        try:
            metrics = shown.metrics if masked is None else dict.fromkeys(self._outputs.metrics or (), 0.0)
            if metrics:
                self._gate.let_out("metric", size_of_numbers(dict(metrics)), self._server)
            self._gate.let_out("update", shown.memory.size, self._server)
            self.await_release()
        except BaseException:
            shown.memory.close()
            raise
        return shown

    def await_release(self) -> None:
        """Wait for the next moment at which something of the round may leave; then let go what was logged."""
        seconds = self._outputs.release_seconds
        if seconds is None or self._begun is None:
            return
        self._stopped.wait(seconds - (self._clock() - self._begun) % seconds)
        for send in self._held:
            send()
        self._held.clear()

    def stop(self) -> None:
        """The job is stopped: nothing is waited for any more."""
        self._stopped.set()

    def _debit(self, round_: int, bits: int) -> None:
        privacy = self._settings.privacy
        epsilon, delta = (0, 0) if privacy is None else debited(privacy, round_)
        export = Export(
            job=self._record.job,
            bundle=self._record.bundle,
            round=round_,
            recipient="/".join(self._server),
            amount=Amount(bits=bits, micro_epsilon=epsilon, pico_delta=delta),
        )
        try:
            self._party.record(EXPORT_KIND, export.model_dump(mode="json"))
        except Refused as error:
            raise BudgetSpent(self._record.job, self._site, error.reasons) from error
        self._debited = round_


def words_that_leave(error: SealwrightError) -> tuple[str, ...]:
    """Why a job ended at its site, as the server and the console are told: nothing that a script said is in it."""
    if isinstance(error, ScriptFailed):
        return (error.told,)
    if isinstance(error, OutputRefused):
        return (error.what,)
    reasons = error.reasons if isinstance(error, Refused) else (error.what,)
    return tuple(reason[:2000] for reason in reasons[:MAX_REASONS])


def caused_by_script(error: SealwrightError) -> bool:
    """Whether it was the script that ended its job."""
    return isinstance(error, ScriptFailed | OutputRefused)
