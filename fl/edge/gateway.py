"""What a gateway answers devices: who they are, whether they may, what they are to do, what became of their results.

No I/O and no waiting: bytes in, bytes out, for one thread. `fl.edge.gateway_service` has the HTTP around it. Every
answer is one that the table (`fl.edge.protocol`) has for its message. What the gateway remembers of devices is for
their good alone (they need not wait for what they have done already): it can be killed at any time.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, cast, get_args

from attestation.canonical import b64
from attestation.introduction import Introducing, introduce
from fl.edge.cohort import masked_most
from fl.edge.contract import Branch, EdgeJob, ModelVersion, Update, contribution_of
from fl.edge.credentials import read_credential
from fl.edge.deltas import DeltaForm, decode_delta
from fl.edge.gateway_masks import Cohorts
from fl.edge.masks import DeviceMasking, masking_of
from fl.edge.messages import (
    ANSWERS,
    PROOF_TYPE,
    REQUESTS,
    Answer,
    Blob,
    Encoding,
    JobAnswer,
    JobRequest,
    MaskAnswer,
    MaskRequest,
    Request,
    ResultAnswer,
    ResultRequest,
    SelectionAnswer,
    SelectionRequest,
    Task,
    TaskAnswer,
    TaskRequest,
    read_words,
)
from fl.edge.protocol import RULES, Message, Status
from fl.edge.sealing import SEAL_OVERHEAD, GroupKeys, seal_answer
from fl.edge.tokens import Device
from fl.errors import MalformedMessage, MalformedTensors
from fl.tensors import FLOATS, parse
from policies.devices import job_matches
from policies.errors import Refused

if TYPE_CHECKING:
    from fl.edge.task import DeviceTask
    from policies.charter import Charter

MAX_REQUEST: Final = 32 << 10
"""Bytes of a request's words: of whatever a request has but tensors."""
COOKIE_SECONDS: Final = 7 * 86400
"""A device has so long for a task: then its version is over anyway."""
REMEMBERED: Final = 1 << 16
"""Devices of which this gateway knows what they reported last."""
MAX_BLOBS: Final = 64
MASK_SECONDS: Final = 1.0
"""How long a device of a cohort waits at most before it asks again: the others wait for it, too."""
OfJob = TaskRequest | SelectionRequest | ResultRequest | MaskRequest
_ENCODINGS: Final[tuple[Encoding, ...]] = get_args(Encoding)


@dataclass(frozen=True, slots=True)
class Pace:
    """How long devices wait, in seconds: with no job, until they are wanted, after a fault or for want of room."""

    no_job: float = 60.0
    task: float = 5.0
    again: float = 10.0


@dataclass(frozen=True, slots=True)
class Call:
    """A request whose sender is known."""

    message: Message
    request: Request
    device: Device
    tensors: memoryview = field(repr=False)


@dataclass(frozen=True, slots=True)
class Gateway:
    """A gateway's decisions.

    `keys`, `charter`, `identity` and `clock` give what the guest has now; `branches` this gateway's jobs by their ids.
    """

    keys: Callable[[], GroupKeys]
    charter: Callable[[], Charter]
    identity: Callable[[], Introducing]
    clock: Callable[[], datetime]
    branches: Callable[[], Mapping[str, Branch]]
    pace: Pace = Pace()
    randomness: Callable[[int], bytes] = os.urandom
    _reported: OrderedDict[tuple[str, str], int] = field(default_factory=OrderedDict, repr=False)
    """The newest version for which each device reported: (the job's beginning here, device) → version."""
    _blobs: OrderedDict[str, tuple[Blob, bytes]] = field(default_factory=OrderedDict, repr=False)
    """By the group key's id and what they are of."""
    _cohorts: Cohorts = field(default_factory=Cohorts, repr=False)
    _forms: OrderedDict[tuple[str, Encoding], DeltaForm] = field(default_factory=OrderedDict, repr=False)
    """What differences look like, by the model's digest and the encoding."""

    # --- for strangers ------------------------------------------------------------------------------------------------

    def proof(self, nonce: str) -> str:
        """Who this gateway is, said freshly over a device's nonce (32 hex digits), and the group key to seal to.

        Raises LeaseEnded while the gateway has no lease.
        """
        charter, keys = self.charter(), self.keys()
        word = {
            "charter": {"id": charter.id, "version": charter.version},
            "group_key": b64(keys.public),
            "key_id": keys.id.hex(),
            "nonce": nonce,
        }
        return introduce(self.identity(), word, typ=PROOF_TYPE)

    def blob(self, identifier: str) -> bytes | None:
        """The bytes of the blob with this id: a model or a graph that devices are given now."""
        for blob, sealed in self._blobs.values():
            if blob.id == identifier:
                return sealed
        for branch in self.branches().values():  # another gateway gave it to the device
            for version in branch.current():
                self._model(version)
                if (task := branch.task(version.task)) is not None:
                    self._graph(task)
        return next((sealed for blob, sealed in self._blobs.values() if blob.id == identifier), None)

    def most(self) -> int:
        """Bytes of the largest request that is read at all."""
        sizes = [
            self._form(version, encoding).most
            for branch in self.branches().values()
            for version in branch.current()[-1:]
            for encoding in _ENCODINGS
        ]
        sizes += [
            masked_most(sum(spec.elements for spec in self._form(version, "f32").schema.values()))
            for branch in self.branches().values()
            for version in branch.current()[-1:]
            if self._masking(branch, version) is not None
        ]
        return SEAL_OVERHEAD + MAX_REQUEST + max(sizes, default=0)

    def ticket(self, text: str) -> str | None:
        """The id of the upload that this ticket is for, or None if no gateway gave it lately."""
        identifier, cookie = text[:32], text[32:]
        at = self.keys().cookie_time(cookie, ticket=identifier)
        return identifier if at is not None and self._recent(at, COOKIE_SECONDS) else None

    # --- for devices --------------------------------------------------------------------------------------------------

    def opened(self, message: Message, body: bytes) -> Call | bytes:
        """Who sends this request, and what it is; or the body of the answer that refuses its sender.

        Raises KeyGone, Refused (what cannot be opened) and MalformedMessage: then nobody is there to be answered.
        """
        opened = self.keys().open(message, body)
        if len(opened.words) > MAX_REQUEST or (message not in ("result", "mask") and opened.tensors):
            raise MalformedMessage("the request is longer than it may be", where=message)
        request = read_words(REQUESTS[message], opened.words, where=message)
        try:
            device = read_credential(request.token, self.charter(), self.clock())
            if not opened.is_signed_by(device.key):
                raise Refused(
                    "the request is not signed by the device of its token or certificate",
                    where="device",
                    do="Sign with the device's key.",
                )
        except Refused as error:
            return self._sealed(message, request, _refusal(message, "; ".join(error.reasons)))
        return Call(message, request, device, opened.tensors)

    def decide(self, call: Call) -> Answer:
        """What to answer."""
        request = call.request
        if call.message == "job":
            return self._job(call.device, cast(JobRequest, request))
        branch = self.branches().get(cast(OfJob, request).job)
        if branch is None:
            return _answer(call.message, "NO_JOB", "this gateway does not have the job", self.pace.no_job)
        if not call.device.may(branch.job.name):
            return _refusal(call.message, f"the device's token is not for the job {branch.job.name}")
        if branch.over:
            return _answer(call.message, "DONE", "the job is over", self.pace.no_job)
        if call.message == "task":
            return self._task(call.device, branch)
        if call.message == "selection":
            return self._selection(branch, cast(SelectionRequest, request))
        if call.message == "mask":
            return self._mask(call.device, branch, cast(MaskRequest, request), call.tensors)
        return self._result(call.device, branch, cast(ResultRequest, request), call.tensors)

    def sealed(self, call: Call, answer: Answer) -> bytes:
        """The body of an answer."""
        return self._sealed(call.message, call.request, answer)

    def failed(self, call: Call) -> Answer:
        """The answer to a request at which this gateway failed."""
        return _answer(call.message, "ERROR", "the gateway failed", self.pace.again)

    # --- messages -----------------------------------------------------------------------------------------------------

    def _job(self, device: Device, request: JobRequest) -> Answer:
        offered = [
            branch
            for _, branch in sorted(self.branches().items())
            if job_matches(branch.job.name, request.jobs) and device.may(branch.job.name)
        ]
        able = [branch for branch in offered if _able(branch.job, request.capabilities)]
        for branch in able:
            if not branch.over:
                job = branch.job
                return JobAnswer(status="OK", job=job.job, name=job.name, method=job.method, config=dict(job.config))
        if able:
            return _answer("job", "DONE", "every job that matches is over", 0.0)
        why = "no job has a name that matches" if not offered else "this device lacks what the job demands"
        return _answer("job", "NO_JOB", why, self.pace.no_job)

    def _task(self, device: Device, branch: Branch) -> Answer:
        current = branch.current()
        if not current:
            return _answer("task", "NO_TASK", "there is no version to train yet", self.pace.task)
        if self._reported.get((branch.origin, device.name), -1) >= current[-1].version:
            return _answer("task", "RETRY", "the device has trained the newest version", self.pace.task)
        version = branch.select(device.name)
        if version is None:
            return _answer("task", "RETRY", "the device is not wanted now", self.pace.task)
        task = branch.task(version.task)
        if task is None:
            return _answer("task", "ERROR", "the version's task is not here", self.pace.again)
        at = int(self.clock().timestamp())
        keys, upload = self.keys(), self.randomness(16).hex()
        return TaskAnswer(
            status="OK",
            task=Task(
                version=version.version,
                name=task.job,
                digest=version.task,
                format=task.format,
                config=dict(task.config),
                graph=self._graph(task),
                model=self._model(version),
                cookie=keys.cookie(at, **_claims(branch.job.job, version.version, version.task, device)),
                ticket=upload + keys.cookie(at, ticket=upload),
            ),
        )

    def _selection(self, branch: Branch, request: SelectionRequest) -> Answer:
        versions = tuple(version.version for version in branch.current())
        status: Status = "OK" if request.version in versions else "NO_TASK"
        return SelectionAnswer(status=status, versions=versions)

    def _result(self, device: Device, branch: Branch, request: ResultRequest, tensors: memoryview) -> Answer:
        version = self._given("result", device, branch, request)
        if isinstance(version, Answer):
            return version
        if self._masking(branch, version) is not None:
            return _refusal("result", "this job's results are masked: send them by the message mask")
        try:
            form = self._form(version, request.encoding)
            delta = decode_delta(tensors, form, compressed=request.compressed)
        except MalformedTensors as error:
            return _refusal("result", f"the result is refused: {error.what}")
        weight = min(request.weight, branch.job.bounds.max_weight)
        contribution = contribution_of(branch.job, request.version, device.name)
        verdict = branch.add(Update(request.version, delta, weight, contribution))
        if verdict in ("counted", "duplicate"):
            self._remember(branch.origin, device, request.version)
            return ResultAnswer(status="OK", message=verdict)
        if verdict == "stale":
            return _answer("result", "NO_TASK", "the version is trained no more", 0.0)
        if verdict == "busy":
            return _answer("result", "RETRY", "there is no room now", self.pace.task)
        return _refusal("result", f"the result is {verdict}")

    def _mask(self, device: Device, branch: Branch, request: MaskRequest, tensors: memoryview) -> Answer:
        version = self._given("mask", device, branch, request)
        if isinstance(version, Answer):
            return version
        masking = self._masking(branch, version)
        if masking is None:
            return _refusal("mask", "this job's results are not masked")
        try:
            said = self._cohorts.hear(
                device,
                branch,
                request,
                tensors,
                masking=masking,
                schema=self._form(version, "f32").schema,
                charter=self.charter(),
                at=self.clock(),
                now=time.monotonic(),
            )
        except (MalformedTensors, Refused) as error:
            return _refusal("mask", f"the step {request.step} is refused: {error.what}")
        if said.wait:
            return _answer("mask", "RETRY", "others have still to take this step", min(self.pace.task, MASK_SECONDS))
        if said.step is None:
            if said.counted:
                self._remember(branch.origin, device, request.version)
            return _answer("mask", "NO_TASK", said.why, 0.0)
        return MaskAnswer(status="OK", step=said.step, body=said.body)

    # --- within -------------------------------------------------------------------------------------------------------

    def _given(
        self, message: Message, device: Device, branch: Branch, request: ResultRequest | MaskRequest
    ) -> ModelVersion | Answer:
        """The version that a gateway gave this device to train, if it is trained still; else the answer."""
        at = self.keys().cookie_time(request.cookie, **_claims(request.job, request.version, request.task, device))
        if at is None or not self._recent(at, COOKIE_SECONDS):
            return _refusal(message, "no gateway gave this device this task lately")
        version = next((one for one in branch.current() if one.version == request.version), None)
        return version or _answer(message, "NO_TASK", "the version is trained no more", 0.0)

    def _masking(self, branch: Branch, version: ModelVersion) -> DeviceMasking | None:
        task = branch.task(version.task)
        return None if task is None else masking_of(task.config)

    def _sealed(self, message: Message, request: Request, answer: Answer) -> bytes:
        if (message, answer.status) not in RULES:
            raise AssertionError(f"{answer.status} is no answer to {message}")
        key = bytes.fromhex(request.answer_key)
        return seal_answer(answer.to_bytes(), key, request.request, self.randomness)

    def _recent(self, at: int, seconds: int) -> bool:
        return -seconds < self.clock().timestamp() - at < seconds

    def _remember(self, origin: str, device: Device, version: int) -> None:
        place = (origin, device.name)
        self._reported[place] = max(version, self._reported.get(place, -1))
        self._reported.move_to_end(place)
        while len(self._reported) > REMEMBERED:
            self._reported.popitem(last=False)

    def _graph(self, task: DeviceTask) -> Blob:
        return self._blob(f"graph {task.digest}", task.graph)

    def _model(self, version: ModelVersion) -> Blob:
        return self._blob(f"model {version.digest}", version.model)

    def _blob(self, what: str, content: bytes) -> Blob:
        keys = self.keys()
        place = f"{keys.id.hex()} {what}"
        found = self._blobs.get(place)
        if found is None:
            found = self._blobs[place] = keys.seal_blob(content)
            while len(self._blobs) > MAX_BLOBS:
                self._blobs.popitem(last=False)
        return found[0]

    def _form(self, version: ModelVersion, encoding: Encoding) -> DeltaForm:
        place = (version.digest, encoding)
        found = self._forms.get(place)
        if found is None:
            schema = parse(version.model, max_size=len(version.model), where="model").schema
            floats = {name: spec for name, spec in schema.items() if spec.dtype in FLOATS}
            found = self._forms[place] = DeltaForm.of(floats, encoding)
            while len(self._forms) > MAX_BLOBS:
                self._forms.popitem(last=False)
        return found


def _able(job: EdgeJob, capabilities: Mapping[str, str]) -> bool:
    return all(capabilities.get(name) == value for name, value in job.capabilities.items())


def _claims(job: str, version: int, task: str, device: Device) -> dict[str, Any]:
    return {"device": device.name, "job": job, "task": task, "version": version}


def _answer(message: Message, status: Status, text: str, seconds: float) -> Answer:
    return ANSWERS[message](status=status, message=text[:500], retry_seconds=seconds)


def _refusal(message: Message, why: str) -> Answer:
    return _answer(message, "INVALID_REQUEST", why, 0.0)
