"""A running training script, from its site's side: greet it, give it rounds, take its updates, end it.

The script is not trusted. It can send one update for one round, whole and sealed, and a bounded number of values;
anything else ends the conversation with a reason.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Final, Protocol

from fl.errors import MalformedMessage, ScriptFailed
from fl.jobs.settings import JobSettings, TaskKind
from fl.transport.local import Answer, End, FoldedUpdate, Hello, ScriptSocket, Training, Value
from fl.transport.memory import SealedMemory

MAX_VALUES_A_ROUND: Final = 10_000
END_SECONDS: Final = 30.0
"""How long a script may take to finish after its job is over."""


class Session(Protocol):
    """The conversation with one script, wherever the script is."""

    def greet(self, job_id: str, settings: JobSettings, *, data: str | None, max_update: int) -> None:
        """Tell the script who and where it is."""

    def train(
        self,
        round_: int,
        total: int,
        model: SealedMemory,
        *,
        seconds: float,
        value: Callable[[str, float, int], None],
        line: Callable[[str], None] | None = None,
        task: TaskKind = "train",
        update: FoldedUpdate | None = None,
    ) -> tuple[Answer, SealedMemory]:
        """Give the script a task, or an aggregator an update; its answer and tensors, the caller's.

        Raises ScriptFailed.
        """

    def end(self) -> None:
        """Tell the script that the job is over."""

    def close(self) -> None:
        """Close the site's end."""


class ScriptSession:
    """The conversation with one script of this machine."""

    def __init__(self, sock: socket.socket, *, site: str, how_it_ended: Callable[[], str]) -> None:
        """`how_it_ended` tells, after the script's end of the socket has closed, what became of the script."""
        self._raw = sock
        self._socket = ScriptSocket(sock, peer=site)
        self._site = site
        self._how_it_ended = how_it_ended
        self._max_update = 0

    def greet(self, job_id: str, settings: JobSettings, *, data: str | None, max_update: int) -> None:
        """Tell the script who and where it is."""
        self._max_update = max_update
        hello = Hello(
            site=self._site,
            job_id=job_id,
            job_name=settings.name,
            framework=settings.framework,
            total_rounds=settings.num_rounds,
            data=data,
            max_update=max_update,
            parameters=settings.parameters,
            params_type=settings.params_type,
            receive_filters=settings.filters.receive,
            send_filters=settings.filters.send,
        )
        try:
            self._socket.send(hello)
        except OSError as error:
            raise ScriptFailed(self._site, self._how_it_ended()) from error

    def train(
        self,
        round_: int,
        total: int,
        model: SealedMemory,
        *,
        seconds: float,
        value: Callable[[str, float, int], None],
        line: Callable[[str], None] | None = None,
        task: TaskKind = "train",
        update: FoldedUpdate | None = None,
    ) -> tuple[Answer, SealedMemory]:
        """Give the script the model of a round and its `task`, or an aggregator an `update`; its answer and tensors.

        These are the caller's to close.

        Raises ScriptFailed if it ends, takes more than `seconds`, or says something malformed.
        """
        deadline = time.monotonic() + seconds
        self._raw.settimeout(seconds)
        values = 0
        try:
            self._socket.send(Training(task=task, round=round_, total_rounds=total, update=update), model.descriptor)
            while True:
                self._raw.settimeout(max(0.001, deadline - time.monotonic()))
                message, descriptor = self._socket.receive_from_script()
                if message is None:
                    raise ScriptFailed(self._site, self._how_it_ended())
                if isinstance(message, Answer):
                    return self._answer(message, descriptor, round_)
                if descriptor is not None:
                    os.close(descriptor)
                    raise ScriptFailed(self._site, "sent a descriptor with a value")
                values += 1
                if values > MAX_VALUES_A_ROUND:
                    raise ScriptFailed(self._site, f"logged more than {MAX_VALUES_A_ROUND} values in one round")
                if isinstance(message, Value):
                    value(message.key, message.value, message.step)
                elif line is not None:
                    line(message.text)
                else:
                    raise ScriptFailed(self._site, "logged text where none is taken")
        except TimeoutError as error:
            raise ScriptFailed(self._site, f"did not answer round {round_} within {seconds:.0f} s") from error
        except OSError as error:
            raise ScriptFailed(self._site, self._how_it_ended()) from error
        except MalformedMessage as error:
            raise ScriptFailed(
                self._site, f"broke the client API: {error.what}", told="broke the client API"
            ) from error

    def _answer(self, answer: Answer, descriptor: int | None, round_: int) -> tuple[Answer, SealedMemory]:
        if descriptor is None:
            raise ScriptFailed(self._site, "sent an update without tensors")
        memory = SealedMemory.adopt(descriptor, max_size=self._max_update, where=self._site)
        if answer.round != round_:
            memory.close()
            why = f"answered round {answer.round} when asked for round {round_}"
            raise ScriptFailed(self._site, why, told="answered another round than it was asked for")
        return answer, memory

    def end(self) -> None:
        """Tell the script that the job is over."""
        try:
            self._socket.send(End())
        except OSError:
            return  # it has gone already, which is what was wanted

    def close(self) -> None:
        """Close the site's end."""
        self._socket.close()
