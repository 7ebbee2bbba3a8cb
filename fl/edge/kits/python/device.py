"""The job loop of a device: what it does next follows from the protocol's table and from nothing else.

`step` does one thing (a message, or a task's training) and says how long to wait; `run` goes on until it is stopped. A
device that is killed at any moment goes on from its folder. It sends nothing before a gateway has proved itself to it,
and runs nothing that the charter does not approve.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, cast

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

from fl.edge.deltas import encode_delta
from fl.edge.kits.python.connection import GatewayConnection, GatewayUnavailable, KeyRotated
from fl.edge.kits.python.data import Arrays, Condition, DataSource, Event, Filter, named_filters
from fl.edge.kits.python.memory import Memory, Standing
from fl.edge.kits.python.trainer import Trainer, TrainingStopped
from fl.edge.kits.python.trust import GatewayProof, Trust
from fl.edge.masks import CAPABILITY, COUNTED, CohortDevice, context_of, masking_of
from fl.edge.messages import (
    ANSWERS,
    Answer,
    Blob,
    Encoding,
    JobAnswer,
    JobRequest,
    MaskAnswer,
    MaskRequest,
    Request,
    ResultRequest,
    SelectionRequest,
    Task,
    TaskAnswer,
    TaskRequest,
    read_words,
)
from fl.edge.protocol import GAVE_UP, MASKED, SENDS, TRAINED, Message, Rule, next_state
from fl.edge.sealing import open_answer, open_blob, seal_request
from fl.errors import MalformedTensors
from fl.tensors import FLOATS, parse, widen_bf16
from policies.errors import Refused, SealwrightError

FIRST_PAUSE: Final = 2.0
LONGEST_PAUSE: Final = 900.0
"""Seconds between two tries; each failure doubles them."""
PROOF_MARGIN: Final = timedelta(seconds=2)
UPLOAD_FROM: Final = 4 << 20
"""Bytes of a sealed result from which on it is sent in pieces."""
_NO_FILTERS: Final[Mapping[str, Filter]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class DeviceSettings:
    """What an app decides. `jobs`: names, or their beginning and `*`, in which it takes part."""

    jobs: tuple[str, ...]
    capabilities: dict[str, str] = field(default_factory=dict)
    encoding: Encoding = "bf16"
    compressed: bool = False
    wait_seconds: float = 20.0
    """How long a gateway may hold back the answer to a request for a task."""
    selection_seconds: float = 30.0
    """While it trains, a device asks so often whether its version is still trained."""


class Device:
    """A device. For one thread."""

    def __init__(
        self,
        connection: GatewayConnection,
        trust: Trust,
        token: str,
        key: EllipticCurvePrivateKey,
        source: DataSource,
        trainer: Trainer,
        folder: Path,
        settings: DeviceSettings,
        *,
        filters_in: Sequence[Filter] = (),
        filters_out: Sequence[Filter] = (),
        filters: Mapping[str, Filter] = _NO_FILTERS,
        condition: Condition = lambda: None,
        event: Event = lambda _name, _details: None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        rng: np.random.Generator | None = None,
    ) -> None:
        """`token` and `key`: what the consortium's issuer gave this device; `folder`: its own, private.

        `filters_in` and `filters_out` are always applied; `filters` are those that a task's configuration, which the
        charter approves, may name in lists of the same names.
        """
        self._connection = connection
        self._trust = trust
        self._token = token
        self._key = key
        self._source = source
        self._trainer = trainer
        self._memory = Memory(folder)
        self._settings = settings
        self._filters_in = tuple(filters_in)
        self._filters_out = tuple(filters_out)
        self._filters = dict(filters)
        self._condition = condition
        self._event = event
        self._clock = clock
        self._rng = np.random.default_rng() if rng is None else rng
        self._proof: GatewayProof | None = None
        self._cohort: CohortDevice | None = None
        self._failures = 0
        self.standing: Standing = self._memory.standing()
        """Where it is."""

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set or the device is over."""
        while not stop.is_set() and self.standing.state != "over":
            stop.wait(self.step())

    def step(self) -> float:
        """Do the next thing; how many seconds to wait before the one after it."""
        if self.standing.state == "over":
            return LONGEST_PAUSE
        why = self._condition()
        if why is not None:
            self._event("waiting", {"why": why})
            return FIRST_PAUSE
        try:
            state = self.standing.state
            seconds = self._train() if state == "training" else self._say(SENDS[state])
        except KeyRotated:
            self._proof = None
            seconds = self._pause()
        except GatewayUnavailable as error:
            self._event("waiting", {"why": error.what})
            seconds = max(error.seconds, self._pause())
        except Refused as error:  # the gateway, the charter or an answer does not hold: nothing was sent, or believed
            self._proof = None
            if self.standing.state == "masking":  # what it would have said next, nobody hears
                self._cohort = None
                self._give_up()
            self._event("refused", {"why": error.what, "reasons": list(error.reasons)})
            seconds = self._pause()
        else:
            self._failures = 0 if seconds == 0 else self._failures
        return seconds

    # --- messages -----------------------------------------------------------------------------------------------------

    def _say(self, message: Message) -> float:
        """Send `message`; go where the table leads."""
        if message == "mask" and self._cohort is None:
            self._cohort = self._in_cohort()
        answer = self._ask(message)
        rule = next_state(message, answer.status)
        if isinstance(answer, MaskAnswer) and answer.status == "OK":
            cast(CohortDevice, self._cohort).hear(answer.step, answer.body)
        self._go(rule, answer)
        if rule.then != "masking":
            self._cohort = None
        if answer.status == "ERROR":
            return max(answer.retry_seconds, self._pause())
        self._failures = 0
        return max(answer.retry_seconds, 0.1) if rule.waits else 0.0

    def _go(self, rule: Rule, answer: Answer) -> None:
        now = self.standing
        task = now.task if rule.then in ("training", "reporting", "masking") else None
        if isinstance(answer, TaskAnswer) and answer.status == "OK":
            if answer.task is None:
                raise Refused("the gateway's answer has no task", where="task", do="Ask again.")
            task = answer.task
        job, name = (None, None) if rule.then in ("idle", "over") else (now.job, now.name)
        if isinstance(answer, JobAnswer) and answer.status == "OK":
            if answer.job is None or answer.name is None:
                raise Refused("the gateway's answer has no job", where="job", do="Ask again.")
            job, name = answer.job, answer.name
        self._keep(Standing(state=rule.then, job=job, name=name, task=task, weight=now.weight))
        details = {"status": answer.status, "message": answer.message, "job": job or now.job}
        if rule.message == "job":
            self._event({"joined": "joined", "over": "over"}.get(rule.then, "waiting"), details)
        elif rule.message == "mask":
            if rule.then != "masking":
                self._event("reported" if answer.message == COUNTED else "dropped", details)
        elif rule.message == "result":
            kept = rule.then == "reporting"
            self._event("reported" if answer.status == "OK" else "waiting" if kept else "dropped", details)
        elif task is not None and rule.message == "task":
            self._event("task", {**details, "version": task.version})
        elif rule.then == "over":
            self._event("over", details)

    def _keep(self, standing: Standing) -> None:
        self._memory.keep(standing)
        self.standing = standing

    def _ask(self, message: Message) -> Answer:
        """The gateway's answer to the message that the device's standing makes."""
        words, tensors = self._words(message), b""
        if message == "result":
            tensors = self._memory.result() or b""
        elif message == "mask":
            tensors = cast(CohortDevice, self._cohort).tensors
        proof, charter = self._gateway(), self._trust.id
        sealed = seal_request(
            message, words.to_bytes(), tensors, key=self._key, group_key=proof.group_key, charter=charter
        )
        if message == "result" and self.standing.task is not None and len(sealed) >= UPLOAD_FROM:
            body = self._connection.upload(sealed, self.standing.task.ticket)
        else:
            body = self._connection.send(message, sealed)
        opened = open_answer(body, bytes.fromhex(words.answer_key), words.request)
        return read_words(ANSWERS[message], opened, where=message)

    def _words(self, message: Message) -> Request:
        settings, now = self._settings, self.standing
        common: dict[str, Any] = {
            "token": self._token,
            "request": secrets.token_hex(16),
            "answer_key": secrets.token_hex(32),
        }
        if message == "job":
            able = {CAPABILITY: "1", **settings.capabilities}
            return JobRequest(**common, jobs=settings.jobs, capabilities=able)
        common["job"] = now.job
        if message == "task":
            return TaskRequest(**common, wait_seconds=settings.wait_seconds)
        task = cast(Task, now.task)
        if message == "selection":
            return SelectionRequest(**common, version=task.version)
        if message == "mask":
            cohort = cast(CohortDevice, self._cohort)
            return MaskRequest(
                **common,
                version=task.version,
                task=task.digest,
                cookie=task.cookie,
                step=cohort.step,
                body=cohort.body,
            )
        return ResultRequest(
            **common,
            version=task.version,
            task=task.digest,
            weight=now.weight,
            encoding=settings.encoding,
            compressed=settings.compressed,
            cookie=task.cookie,
        )

    def _gateway(self) -> GatewayProof:
        """A gateway that has proved itself, and whose EARs have not ended."""
        at = self._clock()
        if self._proof is None or at >= self._proof.until - PROOF_MARGIN:
            self._proof = None
            raw = self._connection.charter(self._trust.version)
            if raw is not None:
                self._trust.follow(raw, at)
            nonce = secrets.token_hex(16)
            self._proof = self._trust.appraise(self._connection.proof(nonce), nonce, self._clock())
        return self._proof

    def _pause(self) -> float:
        """How long to wait after a failure: twice as long after each, and never the same for all devices."""
        self._failures = min(self._failures + 1, 20)
        return float(min(FIRST_PAUSE * 2.0 ** (self._failures - 1), LONGEST_PAUSE) * (0.5 + self._rng.random()))

    # --- training -----------------------------------------------------------------------------------------------------

    def _train(self) -> float:
        task = cast(Task, self.standing.task)
        self._gateway()  # which brings the charter, where the device was restarted with its task
        try:
            if self.standing.name != task.name:
                raise Refused("the task is for another job", where="task", do="Ask again.")
            self._trust.admit(task, self._clock())
            filters_in = [*self._filters_in, *named_filters(task.config, "filters_in", self._filters)]
            filters_out = [*named_filters(task.config, "filters_out", self._filters), *self._filters_out]
            graph, model = self._content(task.graph), self._model(self._content(task.model))
            dataset = self._source.dataset(task.name, task.config)
            for filter_in in filters_in:
                model = filter_in(model)
            trained = self._trainer.train(graph, task.config, model, dataset, self._rng, self._go_on())
            delta: Arrays = {
                name: trained[name] - model[name] if name in trained else 0 * model[name] for name in model
            }
            for filter_out in filters_out:
                delta = filter_out(delta)
            masking = masking_of(task.config)
            encoding, compressed = self._settings.encoding, self._settings.compressed
            if masking is not None:  # what is masked is summed as whole numbers, of which it says how fine they are
                encoding, compressed = "f32", False
            encoded = encode_delta(delta, encoding, self._rng, compressed=compressed)
        except GatewayUnavailable:
            raise
        except TrainingStopped as stopped:
            self._event("dropped", {"why": str(stopped), "version": task.version})
            if self.standing.state == "training":
                self._give_up()
            return self._pause()
        except SealwrightError as error:  # this task will not come right by trying it again
            reasons = list(error.reasons) if isinstance(error, Refused) else [error.what]
            self._event("refused", {"why": error.what, "reasons": reasons, "version": task.version})
            self._give_up()
            return self._pause()
        self._memory.keep_result(encoded)
        now = self.standing
        state = TRAINED if masking is None else MASKED
        self._keep(now.model_copy(update={"state": state, "weight": float(max(1, len(dataset)))}))
        self._event("trained", {"version": task.version, "bytes": len(encoded)})
        return 0.0

    def _in_cohort(self) -> CohortDevice:
        """The device's part in a cohort, for the result that it has."""
        task, trust = cast(Task, self.standing.task), self._trust
        self._gateway()  # which brings the charter
        masking, raw = masking_of(task.config), self._memory.result()
        if masking is None or raw is None:
            raise TypeError("there is nothing to mask")
        file = parse(raw, max_size=len(raw), where="result")
        return CohortDevice(
            self._token,
            self._key,
            job=task.name,
            context=context_of(trust.id, cast(str, self.standing.job), task.version, task.digest),
            masking=masking,
            difference={name: file.array(name) for name in file.schema},
            weight=self.standing.weight,
            charter=lambda: trust.charter(self._clock()),
            clock=self._clock,
            random=secrets.token_bytes,
        )

    def _give_up(self) -> None:
        self._keep(self.standing.model_copy(update={"state": GAVE_UP, "task": None}))

    def _content(self, blob: Blob) -> bytes:
        """A blob's content, fetched from where its fetching broke off."""
        have = self._memory.blob(blob)
        while len(have) < blob.size + 16:
            have = self._connection.blob(blob, have)
            self._memory.keep_blob(blob, have)
        try:
            return open_blob(blob, have)
        except Refused:
            self._memory.forget_blob(blob)
            raise

    @staticmethod
    def _model(content: bytes) -> Arrays:
        file = parse(content, max_size=len(content), where="model")
        found: Arrays = {}
        for name, spec in file.schema.items():
            if spec.dtype in FLOATS:
                array = file.array(name)
                array = widen_bf16(array) if spec.dtype == "BF16" else array.astype(np.float32)
                if not np.isfinite(array).all():
                    raise MalformedTensors(f"tensor {name!r} holds a number that is not finite", where="model")
                found[name] = array
        return found

    def _go_on(self) -> Callable[[], None]:
        """What a trainer calls before each step: raises TrainingStopped if it is to stop."""
        asked = time.monotonic()

        def look() -> None:
            nonlocal asked
            why = self._condition()
            if why is not None:
                raise TrainingStopped(why)
            if time.monotonic() - asked < self._settings.selection_seconds:
                return
            asked = time.monotonic()
            try:
                answer = self._ask("selection")
            except Refused:
                return  # what is trained may still count; the result will be told otherwise
            rule = next_state("selection", answer.status)
            if rule.then != "training":
                self._go(rule, answer)
                raise TrainingStopped(rule.when)

        return look
