"""An aggregator of one's own: a script of the bundle that makes the next model of the sites' updates.

    from fl.aggregation.custom import Aggregator, serve

    class Median(Aggregator):
        def accept(self, update, site): ...        # an FLModel: params as the site sent them, meta with its weight
        def aggregate(self, model): ...            # the current global model's arrays; the next one's, by name

    serve(Median())

It runs in a process of its own beside the server, in the sandbox in which training scripts run at their sites: it is
the author's code, and sees every site's update. Updates are checked whole before it gets them, and so is the model that
it gives back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Final

from fl.errors import JobFailed, ScriptFailed, UpdateRefused
from fl.guard.gate import admit_update, max_update_size
from fl.jobs.settings import JobSettings, TaskKind
from fl.model import FLModel
from fl.site.script import Session
from fl.tensors import TensorFile
from fl.transport.local import FoldedUpdate
from fl.transport.memory import SealedMemory
from fl.transport.stored import Stored

NAME: Final = "aggregator"


class Aggregator(ABC):
    """What an author implements. One instance lives as long as its job."""

    @abstractmethod
    def accept(self, update: FLModel, site: str) -> None:
        """Take an update of a round: `params` are arrays by name, `params_type` says what they are."""

    @abstractmethod
    def aggregate(self, model: Mapping[str, Any]) -> Mapping[str, Any]:
        """The next global model of the updates since the last call, after `model`: the same names, shapes, dtypes."""


def serve(aggregator: Aggregator) -> None:
    """Be the aggregator of the job that started this script, until it is over."""
    from fl import client

    client.init()
    while (received := client.receive()) is not None:
        if client.is_evaluate():
            aggregator.accept(received, str(received.meta[client.SITE_KEY]))
            client.send(FLModel())
        else:
            client.send(FLModel(params=aggregator.aggregate(received.params)))


class ScriptAggregation:
    """The aggregator from the server's side; it does what a mean does."""

    def __init__(self, session: Session, settings: JobSettings, job: str) -> None:
        """`session` is the conversation with the script, this object's to close. Raises ScriptFailed."""
        self._session = session
        self._settings = settings.model_copy(update={"params_type": "FULL"})
        self._params_type = settings.params_type
        self._job = job
        self._number = 0
        session.greet(job, self._settings, data=None, max_update=max_update_size(settings.schema_of_model))

    def fold(self, update: TensorFile, weight: float, site: str = "", memory: Stored | None = None) -> None:
        """Hand over an admitted update. Raises JobFailed if the script fails."""
        with SealedMemory.of(update.raw) as memory:
            about = FoldedUpdate(site=site, weight=weight, params_type=self._params_type)
            self._ask("evaluate", memory, about).close()

    def result(self, model: TensorFile) -> SealedMemory:
        """The model that the script gives back, checked whole. Raises JobFailed."""
        with SealedMemory.of(model.raw) as memory:
            found = self._ask("train", memory, None)
        try:
            admit_update(found.view, self._settings.schema_of_model, site=NAME)
        except UpdateRefused as error:
            found.close()
            raise JobFailed(self._job, (error.what, *error.reasons)) from error
        return found

    def close(self) -> None:
        """End the script."""
        self._session.end()
        self._session.close()

    def _ask(self, task: TaskKind, memory: SealedMemory, update: FoldedUpdate | None) -> SealedMemory:
        number, self._number = self._number, self._number + 1
        seconds = float(self._settings.round_seconds)
        try:
            _, found = self._session.train(
                number, number + 1, memory, seconds=seconds, value=lambda *_: None, task=task, update=update
            )
        except ScriptFailed as error:
            raise JobFailed(self._job, (error.told,)) from error
        return found
