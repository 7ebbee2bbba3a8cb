"""A device task: the training graph that a device runs, and its configuration; the charter approves its digest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from attestation.canonical import canonical_bytes
from policies.errors import Unusable

if TYPE_CHECKING:
    from fl.jobs.bundle import Bundle

GraphFormat = Literal["executorch"]
"""`executorch`: a training program (.pte) with a loss, gradients and named parameters (fl.edge.training_graph)."""
MAX_GRAPH: Final = 256 << 20
MAX_CONFIG: Final = 64 << 10
_CONTEXT: Final = b"sealwright-device-task-v1\0"


@dataclass(frozen=True)
class DeviceTask:
    """What devices run for the job called `job`: a graph, and `config`, JSON values that its runner reads.

    Raises Unusable if a part is over its bound, or the configuration has no canonical JSON form.
    """

    job: str
    format: GraphFormat
    graph: bytes = field(repr=False)
    config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not 0 < len(self.graph) <= MAX_GRAPH or len(canonical_bytes(dict(self.config))) > MAX_CONFIG:
            raise Unusable(
                f"a graph of {len(self.graph)} bytes, or its configuration, is empty or too large",
                where=f"task of {self.job}",
                do=f"Stay below {MAX_GRAPH} and {MAX_CONFIG} bytes.",
            )

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """What the devices of an edge job run. Raises ValueError for another job's bundle."""
        from fl.jobs.settings import FedBuffOptions

        settings, options = bundle.settings, bundle.settings.options
        if not isinstance(options, FedBuffOptions):
            raise ValueError("only an edge job has a tree")
        return cls(settings.name, "executorch", bundle.files[settings.train_script], options.config)

    @cached_property
    def digest(self) -> str:
        """The hex SHA-256 that the charter's `code/device-DIGEST.json` approves."""
        return task_digest(self.job, self.format, sha256(self.graph).hexdigest(), self.config)


def task_digest(job: str, form: str, graph_sha256: str, config: Mapping[str, Any]) -> str:
    """The digest of a task from its parts: SHA-256 over a context and their canonical JSON."""
    said = {"config": dict(config), "format": form, "graph": graph_sha256, "job": job}
    return sha256(_CONTEXT + canonical_bytes(said)).hexdigest()
