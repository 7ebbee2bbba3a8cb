"""Worker processes that train virtual devices: forked once, with numbers passed in shared memory and short messages.

The processor is the worker's by the fork; nothing is pickled. A worker's message in: version, how many devices, their
numbers; out: how many it did, or what went wrong. Models, differences and weights lie in memory that all share.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import selectors
import socket
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final, Self

import numpy as np
import numpy.typing as npt

from fl.edge.contract import Tensors
from fl.edge.simulation.population import Devices
from fl.edge.simulation.processors import TaskProcessor
from fl.errors import ScriptFailed
from fl.tensors import Schema

BATCH: Final = 64
"""Devices of one message."""
ANSWER_SECONDS: Final = 600.0
_HEAD: Final = struct.Struct("=qq")
_MAX_MESSAGE: Final = 64 << 10


@dataclass(slots=True)
class _Worker:
    pid: int
    socket: socket.socket
    rows: npt.NDArray[np.float32]
    weights: npt.NDArray[np.float64]


class TrainingPool:
    """`workers` processes. `train` gives all of them work; closing it ends them."""

    def __init__(self, processor: TaskProcessor, schema: Schema, workers: int) -> None:
        self._schema = schema
        self._numbers = sum(spec.elements for spec in schema.values())
        self._model_memory = mmap.mmap(-1, max(4, 4 * self._numbers))
        self._model = np.frombuffer(self._model_memory, np.float32, self._numbers)
        self._workers: list[_Worker] = []
        for _ in range(workers):
            self._workers.append(self._start(processor))

    def _start(self, processor: TaskProcessor) -> _Worker:
        memory = mmap.mmap(-1, BATCH * (4 * self._numbers + 8) + 8)
        weights = np.frombuffer(memory, np.float64, BATCH)
        rows = np.frombuffer(memory, np.float32, BATCH * self._numbers, 8 * BATCH).reshape(BATCH, self._numbers)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid:
            theirs.close()
            return _Worker(pid, ours, rows, weights)
        status = 1
        try:
            ours.close()
            for other in self._workers:
                other.socket.close()
            _work(processor, theirs, self._unpacked(self._model), rows, weights)
            status = 0
        finally:
            os._exit(status)

    def _unpacked(self, flat: npt.NDArray[np.float32]) -> Tensors:
        """The tensors in a flat row, or in rows; the same memory."""
        found, at = {}, 0
        for name, spec in sorted(self._schema.items()):
            found[name] = flat[..., at : at + spec.elements].reshape(*flat.shape[:-1], *spec.shape)
            at += spec.elements
        return found

    def train(self, devices: Devices, model: Tensors, version: int) -> Iterator[tuple[int, Tensors, float]]:
        """Train devices from a model: each device's place in `devices`, its difference (a copy), its weight; unordered.

        Raises ScriptFailed if a worker fails, or takes longer than ANSWER_SECONDS for a batch.
        """
        for name, tensor in self._unpacked(self._model).items():
            tensor[...] = model[name]
        left = [(at, devices[at : at + BATCH]) for at in range(0, devices.size, BATCH)][::-1]
        at_work: dict[int, tuple[_Worker, int, Devices]] = {}
        with selectors.DefaultSelector() as ready:
            for worker in self._workers:
                if left:
                    self._give(worker, left, at_work, version)
                    ready.register(worker.socket, selectors.EVENT_READ)
            while at_work:
                events = ready.select(ANSWER_SECONDS)
                if not events:
                    raise ScriptFailed("simulation", f"a batch of devices took longer than {ANSWER_SECONDS:.0f} s")
                for key, _ in events:
                    worker, start, batch = at_work.pop(key.fd)
                    self._check(worker, batch)
                    stacked = self._unpacked(worker.rows)
                    # A copy for each device: one of the batch would stay as long as the slowest of its devices.
                    results = [
                        ({name: each[place].copy() for name, each in stacked.items()}, float(worker.weights[place]))
                        for place in range(batch.size)
                    ]
                    if left:
                        self._give(worker, left, at_work, version)
                    else:
                        ready.unregister(worker.socket)
                    for place, (tensors, weight) in enumerate(results):
                        yield start + place, tensors, weight

    def _give(
        self,
        worker: _Worker,
        left: list[tuple[int, Devices]],
        at_work: dict[int, tuple[_Worker, int, Devices]],
        version: int,
    ) -> None:
        start, batch = left.pop()
        worker.socket.send(_HEAD.pack(version, batch.size) + batch.astype("=i8").tobytes())
        at_work[worker.socket.fileno()] = (worker, start, batch)

    def _check(self, worker: _Worker, batch: Devices) -> None:
        answer = worker.socket.recv(_MAX_MESSAGE)
        if not answer:
            raise ScriptFailed("simulation", "a worker process has ended")
        if answer != _HEAD.pack(0, batch.size):
            raise ScriptFailed("simulation", answer.decode("utf-8", "replace")[:500])

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.socket.close()
        for worker in self._workers:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(worker.pid, 0)
        self._workers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _work(
    processor: TaskProcessor,
    messages: socket.socket,
    model: Tensors,
    rows: npt.NDArray[np.float32],
    weights: npt.NDArray[np.float64],
) -> None:
    """A worker's life: until its parent hangs up."""
    processor.setup()
    names: Sequence[str] = sorted(model)
    while raw := messages.recv(_MAX_MESSAGE):
        version, count = _HEAD.unpack_from(raw)
        devices = np.frombuffer(raw, "=i8", count, _HEAD.size).astype(np.int64)
        try:
            tensors, each = processor.train(devices, model, version)
            rows[:count] = np.concatenate([tensors[name].reshape(count, -1) for name in names], axis=1)
            weights[:count] = each
        except Exception as error:  # the processor is its author's: whatever it raises is told, not lost
            messages.send(f"{type(error).__name__}: {error}".encode()[: _MAX_MESSAGE // 2])
            continue
        messages.send(_HEAD.pack(0, count))
    processor.shutdown()
