"""The client API: what a training script says to its job. Its usual import is `from fl import client as flare`.

    flare.init()
    while flare.is_running():
        received = flare.receive()
        network.load_state_dict(received.params)
        ...train on flare.data_path("train.safetensors")...
        flare.send(flare.FLModel(params=network.state_dict(), metrics={"accuracy": accuracy}))

It works the same in a simulation and in a site's sandbox: one inherited socket joins the script to its job, and models
pass as sealed memory files.
"""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from fl.errors import RecipeUnusable
from fl.model import (
    WEIGHT_KEY,
    FLModel,
    ParamsType,
    Scalar,
    check_metrics,
    check_weight,
    params_of,
    tensors_of,
)
from fl.tensors import parse
from fl.transport.local import Answer, End, Hello, LogLine, ScriptSocket, Training, Value
from fl.transport.memory import SealedMemory

__all__ = [
    "FLModel", "ParamsType", "data_path", "get_job_id", "get_site_name", "init", "is_evaluate", "is_running",
    "is_submit_model", "is_train", "log", "open_model", "receive", "send", "system_info",
]  # fmt: skip

SITE_KEY: Final = "site"
"""In the meta of an update that an aggregator gets: whose it is."""
SOCKET_VARIABLE: Final = "SEAL_CHANNEL"
"""The environment variable that holds the number of the inherited socket."""


class _Session:
    """The script's side of the conversation: a task waits, or is being worked on, or the job is over."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = ScriptSocket(sock, peer="site")
        message, _ = self.socket.receive_from_site()
        if not isinstance(message, Hello):
            raise RecipeUnusable(
                "the site did not greet its script", where="flare.init", do="Start the script by a job."
            )
        self.hello = message
        self.receive_filters = [_filter(name) for name in message.receive_filters]
        self.send_filters = [_filter(name) for name in message.send_filters]
        self.over = False
        self.task = "train"
        self.model: SealedMemory | None = None  # the received model as it came, whatever the script does to its own
        self.waiting: FLModel | None = None
        self.working_on: int | None = None
        self.received: FLModel | None = None

    def wait(self) -> bool:
        """Wait for the next task; False when the job is over."""
        if self.waiting is not None:
            return True
        if self.over:
            return False
        if self.working_on is not None:
            raise RecipeUnusable(
                f"round {self.working_on} was received but not answered",
                where="client API",
                do="Call flare.send(...) first.",
            )
        message, descriptor = self.socket.receive_from_site()
        if message is None or isinstance(message, End):
            self.over = True
            return False
        if not isinstance(message, Training) or descriptor is None:
            raise RecipeUnusable("the site sent no model with its task", where="flare.receive", do="Report this.")
        self.forget()
        self.task = message.task
        memory = SealedMemory.adopt(descriptor, max_size=1 << 48, where="site")
        self.model = SealedMemory(os.dup(descriptor), memory.size)
        tensors = parse(memory.view, max_size=memory.size, where="site")
        self.waiting = FLModel(
            params=params_of(tensors, self.hello.framework),
            meta=dict(self.hello.parameters),
            current_round=message.round,
            total_rounds=message.total_rounds,
        )
        if message.update is not None:
            self.waiting.params_type = message.update.params_type
            self.waiting.meta = {SITE_KEY: message.update.site, WEIGHT_KEY: message.update.weight}
        memory.close()
        for change in self.receive_filters:
            self.waiting = change(self.waiting)
        return True

    def answer(self, model: FLModel) -> tuple[Mapping[str, Any], str]:
        """What is sent of a script's answer: its parameters, as the task and the job want them, and their type."""
        wanted = "FULL" if self.task == "submit_model" else self.hello.params_type
        given = ParamsType(model.params_type).value
        if self.task == "evaluate":
            return {}, wanted
        if given == wanted:
            return model.params, wanted
        assert self.model is not None  # noqa: S101 - a task is open, and tasks come with models
        tensors = parse(self.model.view, max_size=self.model.size, where="site")
        return _converted(model.params, params_of(tensors, self.hello.framework), given), wanted

    def forget(self) -> None:
        """Give the received model back."""
        if self.model is not None:
            self.model.close()
            self.model = None


def _converted(params: Mapping[str, Any], received: Mapping[str, Any], given: str) -> dict[str, Any]:
    """Differences from the received model of whole parameters, or the other way round, in the model's dtypes."""
    if params.keys() != received.keys():
        raise RecipeUnusable(
            "the parameters are not those of the received model", where="flare.send", do="Send every tensor."
        )
    found: dict[str, Any] = {}
    for name, base in received.items():
        value = params[name] - base if given == "FULL" else base + params[name]
        found[name] = value.to(base.dtype) if hasattr(value, "to") else value.astype(base.dtype)
    return found


def _filter(name: str) -> Callable[[FLModel], FLModel]:
    """A filter of the recipe, `module:function`, that is held to its contract."""
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RecipeUnusable(f"the filter {name} is not there: {error}", where="filters") from error

    def change(model: FLModel) -> FLModel:
        changed = found(model)
        if not isinstance(changed, FLModel):
            raise RecipeUnusable(
                f"the filter {name} gave back a {type(changed).__name__}", where="filters", do="Return an FLModel."
            )
        return changed

    return change


_session: _Session | None = None


def init() -> None:
    """Join the job that started this script. Call it once, first."""
    global _session
    if _session is not None:
        return
    number = os.environ.pop(SOCKET_VARIABLE, "")
    if not number.isdecimal():
        raise RecipeUnusable(
            "this script was not started by a job",
            where="flare.init",
            do="Start it through a recipe: recipe.execute(SimEnv(num_clients=2)).",
        )
    _session = _Session(socket.socket(fileno=int(number)))


def is_part_of_a_job() -> bool:
    """Whether a job has started this process, whether or not it has called `init` yet."""
    return _session is not None or SOCKET_VARIABLE in os.environ


def _joined() -> _Session:
    if _session is None:
        raise RecipeUnusable("flare.init() was not called", where="client API", do="Call flare.init() first.")
    return _session


def is_running() -> bool:
    """Whether there is another task; waits for it. False when the job is over."""
    return _joined().wait()


def receive() -> FLModel | None:
    """The global model of the task, with `current_round` (from 0) and `total_rounds`; None when the job is over."""
    session = _joined()
    if not session.wait():
        return None
    model, session.waiting = session.waiting, None
    assert model is not None  # noqa: S101 - wait() said that there is one
    session.working_on, session.received = model.current_round, model
    return model


def send(model: FLModel) -> None:
    """Hand over this round's update: parameters of the model's own names, shapes and dtypes, with metrics and meta.

    Differences and whole parameters are made of each other where the job wants the other. Of the answer to an
    evaluation only the metrics are sent; a site's own model is always sent whole.

    Raises RecipeUnusable if no received model is unanswered, MalformedTensors for metrics or meta that may not travel.
    """
    session = _joined()
    if session.working_on is None:
        raise RecipeUnusable(
            "there is no received model to answer", where="flare.send", do="Send once after each receive."
        )
    for change in session.send_filters:
        model = change(model)
    params, params_type = session.answer(model)
    tensors = tensors_of(params)
    answer = Answer(
        round=session.working_on,
        params_type="DIFF" if params_type == "DIFF" else "FULL",
        metrics=check_metrics(model.metrics),
        weight=check_weight(model.meta),
    )
    with SealedMemory.of_tensors(tensors) as memory:
        session.socket.send(answer, memory.descriptor)
    session.working_on = session.received = None
    session.forget()


def open_model() -> FLModel | None:
    """The model of the task that is open: received and not answered, or received now; None if no task is."""
    session = _joined()
    return session.received if session.working_on is not None else receive() if session.waiting is not None else None


def is_train() -> bool:
    """Whether the task is to train the model."""
    return _joined().task == "train"


def is_evaluate() -> bool:
    """Whether the task is to evaluate the model: the answer needs metrics alone."""
    return _joined().task == "evaluate"


def is_submit_model() -> bool:
    """Whether the task is to hand over the site's own model, as it trained it last."""
    return _joined().task == "submit_model"


def log(key: str, value: float, step: int = 0) -> None:
    """Log one number for the job's tracking, for example `flare.log("loss", loss, step=epoch)`."""
    session = _joined()
    checked = check_metrics({key: value})
    session.socket.send(Value(key=key, value=checked[key], step=step))


def log_line(text: str) -> None:
    """Log a line of text, of a form that the job declares (`declare_outputs(recipe, lines=..., line_bytes=...)`)."""
    _joined().socket.send(LogLine(text=text))


def system_info() -> dict[str, Scalar]:
    """Where the script runs: `identity` and `site_name`, `job_id`, `job_name`, `total_rounds`."""
    hello = _joined().hello
    return {
        "identity": hello.site,
        "site_name": hello.site,
        "job_id": hello.job_id,
        "job_name": hello.job_name,
        "total_rounds": hello.total_rounds,
    }


def get_site_name() -> str:
    """The site's name."""
    return _joined().hello.site


def get_job_id() -> str:
    """The job's id."""
    return _joined().hello.job_id


def data_path(name: str) -> Path:
    """The site's own data file `name`: the same call in a simulation and in a site's sandbox.

    Raises RecipeUnusable if the name is a path or there is no such file; the message lists what there is.
    """
    folder = _joined().hello.data
    if folder is None:
        raise RecipeUnusable(
            "this job has no data", where="flare.data_path", do="Give SimEnv a folder: SimEnv(data=...)."
        )
    if not name or Path(name).name != name:
        raise RecipeUnusable(f"{name!r} is not a plain file name", where="flare.data_path")
    path = Path(folder) / name
    if not path.is_file():
        there = ", ".join(sorted(entry.name for entry in Path(folder).iterdir() if entry.is_file())) or "nothing"
        raise RecipeUnusable(f"the site has no file {name!r}", where="flare.data_path", do=f"It has: {there}.")
    return path
