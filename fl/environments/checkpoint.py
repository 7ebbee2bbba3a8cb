"""What a simulation keeps from round to round in its folder, so that it can go on after its author stopped it.

checkpoint.json              the next round, how rounds were judged so far, what happened, the settings' digest
checkpoint.safetensors       the model of that round
checkpoint-state.safetensors what the algorithm remembers beside it, if anything
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fl.errors import MalformedTensors, RecipeUnusable
from fl.jobs.results import BEST_FILE, JobHistory, write_file, write_json
from fl.jobs.settings import Digest, JobSettings
from fl.model import params_of, tensors_of
from fl.server.federation import Saved
from fl.tensors import encode, parse
from fl.transport.memory import SealedMemory
from fl.transport.stored import Stored

INDEX: Final = "checkpoint.json"
MODEL: Final = "checkpoint.safetensors"
STATE: Final = "checkpoint-state.safetensors"


class Checkpoint(BaseModel):
    """`checkpoint.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    version: Literal[1] = 1
    settings: Digest
    round: Annotated[int, Field(ge=1)]
    model_sha256: Digest
    judged: dict[str, float]
    rounds: list[dict[str, Any]]
    best: dict[str, Any]


class FolderKeeper:
    """Keeps a simulation's state in its folder."""

    def __init__(self, folder: Path, history: JobHistory, *, resume: bool, best: Callable[[], Stored | None]) -> None:
        """`resume`: whether to go on from what is there; `best` gives the best model so far."""
        self._folder = folder
        self._history = history
        self._resume = resume
        self._best = best
        self._written: Stored | None = None

    def saved(self) -> Saved | None:
        """Where the simulation stood; the history is told. Raises RecipeUnusable if there is nothing to go on from."""
        if not self._resume:
            return None
        index = self._folder / INDEX
        try:
            found = Checkpoint.model_validate(json.loads(index.read_bytes()))
            raw = (self._folder / MODEL).read_bytes()
            state_file = self._folder / STATE
            state_raw = state_file.read_bytes() if state_file.exists() else None
        except (OSError, ValueError, ValidationError, RecursionError) as error:
            raise RecipeUnusable("the run has no checkpoint to go on from", where=str(self._folder)) from error
        if found.settings != settings_digest(self._history.settings):
            raise RecipeUnusable("the checkpoint is of another recipe", where=str(self._folder))
        if hashlib.sha256(raw).hexdigest() != found.model_sha256:
            raise RecipeUnusable("the checkpoint's model is not the one it names", where=str(self._folder))
        self._history.rounds[:] = found.rounds
        self._history.best = dict(found.best)
        return Saved(found.round, SealedMemory.of(raw), {} if state_raw is None else _arrays(state_raw), found.judged)

    def save(self, saved: Saved) -> None:
        """Write the state, the index last: what it names is there."""
        write_file(self._folder / MODEL, saved.model.view)
        if saved.state:
            write_file(self._folder / STATE, encode(tensors_of(saved.state)))
        best = self._best()
        if best is not None and best is not self._written:
            write_file(self._folder / BEST_FILE, best.view)
            self._written = best
        index = Checkpoint(
            settings=settings_digest(self._history.settings),
            round=saved.round,
            model_sha256=saved.model.digest,
            judged=dict(saved.judged),
            rounds=self._history.rounds,
            best=self._history.best,
        )
        write_json(self._folder / INDEX, index.model_dump(mode="json"))

    def clear(self) -> None:
        """The simulation has its result: the checkpoint goes."""
        for name in (INDEX, MODEL, STATE):
            (self._folder / name).unlink(missing_ok=True)


def settings_digest(settings: JobSettings) -> str:
    """What has to be equal for a run to go on: every setting but how many rounds there are."""
    document = settings.model_dump_json(exclude={"num_rounds"})
    return hashlib.sha256(document.encode()).hexdigest()


def _arrays(raw: bytes) -> Mapping[str, Any]:
    try:
        return params_of(parse(raw, max_size=len(raw), where=STATE), "numpy")
    except MalformedTensors as error:
        raise RecipeUnusable("the checkpoint's state is damaged", where=STATE) from error
