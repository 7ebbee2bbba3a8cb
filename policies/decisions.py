"""Decisions by Rego rules, in a bounded process.

A package decides by two rules: `allow`, a boolean that is false by default, and `reasons`, the set of sentences why
not. A request is allowed only if `allow` is true and `reasons` is empty. Whatever else happens (an undefined rule, an
error, rules that do not compile, a time-out, a process that dies) denies and says so: there is no way to a yes but one.

The evaluator has no time limit and no memory limit of its own, so it lives in a child process that has both and is
replaced when it exceeds them. The processes are shared by all `Rules` and start when first needed; one set of rules
occupies at most one of them at a time, so that rules that never end leave the others to their neighbours.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import re
import select
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

TIME_LIMIT: Final = 8.0
"""Seconds for one decision, compiling included: milliseconds as a rule, seconds in an emulated guest on a busy host."""
START_LIMIT: Final = 20.0
"""Seconds for a fresh process to be ready."""
MEMORY_LIMIT: Final = 512 * 1024 * 1024
"""Bytes of resident memory of one process (30 MB with nothing to do)."""
SAMPLING: Final = 0.02
"""Seconds between two looks at the memory of a process that has not answered yet; most answer within one."""
WORKERS: Final = 4
FRAME_LIMIT: Final = 8 * 1024 * 1024
"""Bytes of a question (rules, data and input) or of an answer."""
REASON_LIMIT: Final = 100
ALARM_AFTER: Final = 0.5
"""Seconds after the end of a question's time when the evaluator ends itself, if nobody else has ended it."""
_PACKAGE: Final = re.compile(r"[a-z_][a-z0-9_]*(\.[a-z_][a-z0-9_]*)*")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_WORKER_FILE: Final = Path(__file__).with_name("rego_worker.py")


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided; `reasons` say why not, and are empty for a yes."""

    allow: bool
    reasons: tuple[str, ...]


class Given:
    """The input of rules: a JSON-able document as it is handed over, or a `complaint` why it cannot be, exactly.

    One object that is given to several rules is handed over once.
    """

    __slots__ = ("complaint", "content")

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.content = b""
        self.complaint: str | None = None
        try:
            self.content = json.dumps(document, ensure_ascii=False, allow_nan=False).encode("utf-8")
        except (TypeError, ValueError, RecursionError) as error:
            self.complaint = f"the input of the rules is not plain JSON: {error}"
        if b"\\u0000" in self.content:
            self.complaint = "the input of the rules holds a NUL character"


@dataclass(frozen=True, slots=True)
class Asked:
    """One question: the rules, the package that is to decide, its input."""

    rules: Rules
    package: str
    given: Given

    def askable(self) -> bool:
        """Whether an evaluator can be asked at all."""
        named = _PACKAGE.fullmatch(self.package) is not None
        return named and bool(self.rules.modules) and self.given.complaint is None

    def question(self, place: int, *, whole: bool) -> dict[str, Any]:
        """As the evaluator reads it, with its input at `place`; `whole` with the rules themselves."""
        question = {"rules": self.rules.digest, "package": self.package, "input": place}
        return {**question, "modules": self.rules.modules, "data": self.rules.data} if whole else question


def _frame(asked: Sequence[Asked], *, whole: bool = False) -> bytes:
    """The questions as one frame's content; each input is in it once. Raises ValueError if it is too large."""
    places: dict[int, int] = {}
    inputs: list[bytes] = []
    for one in asked:
        if id(one.given) not in places:
            places[id(one.given)] = len(inputs)
            inputs.append(one.given.content)
    questions = json.dumps([one.question(places[id(one.given)], whole=whole) for one in asked], allow_nan=False)
    frame = b'{"inputs":[%b],"questions":%b}' % (b",".join(inputs), questions.encode("ascii"))
    if len(frame) > FRAME_LIMIT:
        raise ValueError(f"rules and input are larger than {FRAME_LIMIT} bytes")
    return frame


def _denied(*reasons: str) -> Decision:
    return Decision(False, reasons)


class WorkerLost(Exception):
    """The evaluating process did not answer: it was too slow, too large, or died."""


def _ready(descriptor: int, event: int, wait: float) -> bool:
    """Whether `descriptor` is ready (or broken, which the next call tells) within `wait` seconds; poll knows no limit
    of 1,024 descriptors, which a broker with many clients exceeds."""
    poll = select.poll()
    poll.register(descriptor, event)
    return bool(poll.poll(wait * 1000))


class _Worker:
    """One evaluating process and the pipe to it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(_WORKER_FILE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={},
            start_new_session=True,  # the terminal's interrupt is for the command, which then closes the pipes
        )
        try:
            if self._read(time.monotonic() + START_LIMIT) != {"ready": True}:
                raise WorkerLost("the evaluator did not start")
        except WorkerLost:
            self.close()
            raise

    def ask(self, frame: bytes, deadline: float) -> list[dict[str, Any]]:
        """Return the answers to a frame's questions. Raises WorkerLost if there are none by `deadline` (monotonic)."""
        stdin = self.process.stdin
        if stdin is None:
            raise WorkerLost("the evaluator has no input")
        seconds = max(0.0, deadline - time.monotonic()) + ALARM_AFTER
        data = memoryview(struct.pack(">Id", len(frame), seconds) + frame)
        descriptor = stdin.fileno()
        os.set_blocking(descriptor, False)
        while data:
            wait = deadline - time.monotonic()
            if wait <= 0 or not _ready(descriptor, select.POLLOUT, wait):
                raise WorkerLost("the rules took too long")
            try:
                data = data[os.write(descriptor, data) :]
            except OSError as error:
                raise WorkerLost("the evaluator died") from error
        answers: list[dict[str, Any]] = self._read(deadline)["answers"]
        return answers

    def _read(self, deadline: float) -> dict[str, Any]:
        size = struct.unpack(">I", self._exactly(4, deadline))[0]
        if size > FRAME_LIMIT:
            raise WorkerLost("the evaluator's answer is too large")
        reply: dict[str, Any] = json.loads(self._exactly(size, deadline))
        return reply

    def _exactly(self, size: int, deadline: float) -> bytes:
        stdout = self.process.stdout
        if stdout is None:
            raise WorkerLost("the evaluator has no output")
        parts = bytearray()
        while len(parts) < size:
            wait = deadline - time.monotonic()
            if wait <= 0:
                raise WorkerLost("the rules took too long")
            if not _ready(stdout.fileno(), select.POLLIN, min(wait, SAMPLING)):
                if self._resident_bytes() > MEMORY_LIMIT:
                    raise WorkerLost(f"the rules took more than {MEMORY_LIMIT} bytes of memory")
                continue
            part = os.read(stdout.fileno(), size - len(parts))
            if not part:
                raise WorkerLost("the evaluator died")
            parts += part
        return bytes(parts)

    def _resident_bytes(self) -> int:
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text("ascii").split()[1])
        except (OSError, IndexError):  # it is gone: the next read tells
            return 0
        return pages * _PAGE

    def close(self) -> None:
        """End the process and wait for it (it has no children and cannot refuse)."""
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
        self.process.wait()


class _Workers:
    """The shared processes: at most WORKERS, the last used first."""

    def __init__(self) -> None:
        self.places = threading.BoundedSemaphore(WORKERS)
        self.lock = threading.Lock()
        self.idle: list[_Worker] = []

    def ask(self, asked: Sequence[Asked], seconds: float) -> list[dict[str, Any]]:
        """Ask a free process; wait for one, and for its answers, at most `seconds` each. Raises WorkerLost."""
        if not self.places.acquire(timeout=seconds):
            raise WorkerLost("all evaluators are busy")
        try:
            worker = self._take()
            try:
                deadline = time.monotonic() + seconds
                replies = worker.ask(_frame(asked), deadline)
                for place, one in enumerate(asked):
                    if replies[place].get("unknown"):
                        (replies[place],) = worker.ask(_frame([one], whole=True), deadline)
            except BaseException:
                worker.close()
                raise
            with self.lock:
                self.idle.append(worker)
            return replies
        finally:
            self.places.release()

    def _take(self) -> _Worker:
        while True:
            with self.lock:
                if not self.idle:
                    break
                worker = self.idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.close()
        return _Worker()

    def close(self) -> None:
        """End the idle processes."""
        with self.lock:
            idle, self.idle = self.idle, []
        for worker in idle:
            worker.close()

    def forget(self) -> None:
        """In a forked child: the processes and their pipes belong to the parent."""
        self.places = threading.BoundedSemaphore(WORKERS)
        self.lock = threading.Lock()
        for worker in self.idle:
            worker.process.returncode = 0  # not ours to wait for
            for stream in (worker.process.stdin, worker.process.stdout):
                if stream is not None:
                    stream.close()
        self.idle = []


_workers = _Workers()


def end_idle_evaluators() -> None:
    """End the evaluating processes that have nothing to do; the next decision starts one again."""
    _workers.close()


atexit.register(_workers.close)
os.register_at_fork(after_in_child=_workers.forget)


class Rules:
    """Rego modules (file name → text) with the data they read: `data.NAME` for each member of `data`.

    Immutable and safe to use from several threads; evaluations of one `Rules` follow one another.
    """

    def __init__(
        self, modules: Mapping[str, str], data: Mapping[str, Any] | None = None, time_limit: float = TIME_LIMIT
    ) -> None:
        self.modules = dict(modules)
        self.data = dict(data or {})
        self.time_limit = time_limit
        content = json.dumps([self.modules, self.data], sort_keys=True, ensure_ascii=True, allow_nan=False)
        self.digest = hashlib.sha256(content.encode("ascii")).hexdigest()
        self._turn = threading.Lock()

    def complaint(self, package: str) -> str | None:
        """Return why these rules can decide nothing as `package` (they do not compile, they lack a rule), or None."""
        decision, sound = self._outcome(package, Given({}))
        return None if sound else decision.reasons[0]

    def decide(self, package: str, document: Mapping[str, Any]) -> Decision:
        """Decide over `document` (the rules' `input`, JSON-able) by `package`; never raises for what is in either."""
        return self._outcome(package, Given(document))[0]

    def _outcome(self, package: str, given: Given) -> tuple[Decision, bool]:
        """The decision, and whether it is the rules' own: they were there, were evaluated, and said what they must."""
        if not _PACKAGE.fullmatch(package):
            return _denied(f"{package[:100]!r} is no name of a package"), False
        if not self.modules:
            return _denied(f"the rules of {package} are not there"), False
        if given.complaint is not None:
            return _denied(given.complaint), False
        if not self._turn.acquire(timeout=self.time_limit):
            return _denied(f"the rules of {package} are busy with an earlier question"), False
        try:
            (reply,) = _workers.ask([Asked(self, package, given)], self.time_limit)
        except (WorkerLost, OSError, ValueError) as error:
            return _denied(f"the rules of {package} could not be evaluated: {error}"), False
        finally:
            self._turn.release()
        fault = _fault(reply)
        if fault is not None:
            return _denied(f"the rules of {package} {fault}"), False
        return _judge(package, reply["allow"][0], reply["reasons"][0]), True

    @contextmanager
    def _turns(self, others: Iterable[Rules]) -> Iterator[None]:
        """Have one's own turn and that of others, all in one order. Raises WorkerLost if one does not come."""
        with ExitStack() as stack:
            for rules in sorted({self, *others}, key=lambda one: (one.digest, id(one))):
                if not rules._turn.acquire(timeout=self.time_limit):
                    raise WorkerLost("the rules are busy with an earlier question")
                stack.callback(rules._turn.release)
            yield

    @staticmethod
    def decide_all(asked: Sequence[Asked]) -> list[Decision]:
        """Decide each as `decide` does, in one exchange with an evaluator: a tenth of the time, if there are many.

        If it comes to no good end, each is decided by itself, so that one cannot spoil what is decided of another.
        """
        if len(asked) > 1 and all(one.askable() for one in asked):
            first = asked[0].rules
            try:
                with first._turns(one.rules for one in asked):
                    replies = _workers.ask(asked, first.time_limit)
            except (WorkerLost, OSError, ValueError):
                replies = []
            if len(replies) == len(asked) and all(_fault(reply) is None for reply in replies):
                return [
                    _judge(one.package, reply["allow"][0], reply["reasons"][0])
                    for one, reply in zip(asked, replies, strict=True)
                ]
        return [one.rules._outcome(one.package, one.given)[0] for one in asked]


def _fault(reply: Mapping[str, Any]) -> str | None:
    """What is wrong with the rules themselves, if anything is."""
    if "error" in reply:
        return f"fail: {' '.join(str(reply['error']).split())[:500]}"
    allow, reasons = reply.get("allow"), reply.get("reasons")
    if allow == [] and reasons == []:
        return "are not there, or are undefined"
    if not isinstance(reasons, list) or len(reasons) != 1 or not isinstance(allow, list) or len(allow) != 1:
        return "do not define both `allow` and `reasons`"
    if not isinstance(reasons[0], list) or not all(isinstance(item, str) for item in reasons[0]):
        return "have `reasons` that are no set of sentences"
    return None


def _judge(package: str, allow: object, reasons: list[str]) -> Decision:
    if reasons:
        more = (f"and {len(reasons) - REASON_LIMIT} more",) if len(reasons) > REASON_LIMIT else ()
        return _denied(*(item[:500] for item in sorted(reasons)[:REASON_LIMIT]), *more)
    if allow is not True:
        return _denied(f"the rules of {package} do not allow it and give no reason")
    return Decision(True, ())
