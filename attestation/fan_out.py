"""Ask several brokers at once, and wait for them within bounds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from queue import Empty, SimpleQueue
from typing import Final, TypeVar

from attestation.errors import BrokerUnavailable
from policies.errors import SealwrightError

T = TypeVar("T")

LINGER_SECONDS: Final = 1.0
"""How long the slower brokers are waited for once enough have answered."""


def ask_all(
    questions: Mapping[str, Callable[[], T]],
    *,
    seconds: float,
    enough: int | None = None,
    linger: float = LINGER_SECONDS,
) -> tuple[dict[str, T], dict[str, SealwrightError]]:
    """Put each broker's question in a thread of its own; return the answers and the failures, each by broker.

    Waits `seconds` at most, and only `linger` more once `enough` have answered; who has not answered then counts as
    unavailable. Its thread ends when its own call does, which the connection bounds. A fault of ours is raised here.
    """
    done: SimpleQueue[tuple[str, T | BaseException]] = SimpleQueue()

    def ask(name: str, question: Callable[[], T]) -> None:
        try:
            done.put((name, question()))
        except BaseException as error:  # whatever it is, the one who waits has to get it
            done.put((name, error))

    for name, question in questions.items():
        threading.Thread(target=ask, args=(name, question), name=f"broker {name}", daemon=True).start()
    answers: dict[str, T] = {}
    failures: dict[str, SealwrightError] = {}
    deadline = time.monotonic() + seconds
    while len(answers) + len(failures) < len(questions):
        try:
            name, outcome = done.get(timeout=max(0.0, deadline - time.monotonic()))
        except Empty:
            break
        if isinstance(outcome, SealwrightError):
            failures[name] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            answers[name] = outcome
            if len(answers) == enough:
                deadline = min(deadline, time.monotonic() + linger)
    for name in questions:
        if name not in answers and name not in failures:
            failures[name] = BrokerUnavailable(f"broker {name} did not answer in time", where="brokers")
    told = {name: answers[name] for name in questions if name in answers}
    return told, {name: failures[name] for name in questions if name in failures}
