"""FedBuff: Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous Aggregation", algorithm 1; pure.

The server keeps a buffer; when it holds at least K updates, the model makes a step and the buffer is empty again:

    x(t+1) = x(t) + eta_g * sum_i s(tau_i) w_i Delta_i / sum_i w_i

with Delta_i a device's difference from the version that it trained, tau_i how many versions that is behind, s the
staleness weight and w_i the device's weight (1 in the paper). Since s depends on the version alone, sums by version are
all that it needs. With K = concurrency = `min_hole_to_fill` the rounds are synchronous, and with s = 1, eta_g = 1 they
are FederatedAveraging's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fl.aggregation.weighted_mean import as_dtype
from fl.edge.contributions import Contributions
from fl.edge.partial_sum import PartialSum, VersionSum, float_schema
from fl.edge.permits import Deal, Demand
from fl.edge.settings import EdgeSettings
from fl.tensors import NUMPY_DTYPE, Schema, layout, parse, widen_bf16
from fl.transport.memory import DraftMemory, SealedMemory

FIRST_VERSION = 1

Noise = Callable[[int], npt.NDArray[np.float64]]
"""So many independent standard normal numbers."""


@dataclass(frozen=True, slots=True)
class Step:
    """What made a version: how many updates, their weight, how many of each staleness, and what was lost on the way.

    `lost`: contributions of versions that ended with this step which were claimed and never came, by the gateway's
    origin.
    """

    version: int
    updates: int
    weight: float
    staleness: Mapping[int, int]
    lost: Mapping[str, int] = field(default_factory=dict)


class FedBuff:
    """The root's state. For one thread at a time. `close` gives the models' memory back."""

    def __init__(
        self,
        schema: Schema,
        model: SealedMemory,
        settings: EdgeSettings,
        generator: np.random.Generator,
        noise: Noise | None = None,
        *,
        version: int = FIRST_VERSION,
        used: bytes = b"",
    ) -> None:
        """`model` becomes the version `version`, and its memory this object's. `used`: what `contributions.used` was
        before, where a job goes on. `generator` deals permits if they are dealt
        at random; `noise` draws what `settings.privacy` asks for, and must not be guessable.
        """
        if settings.privacy is not None and noise is None:
            raise ValueError("private settings need noise")
        self._schema = schema
        self._floats = float_schema(schema)
        self._settings = settings
        self._noise = noise
        self.version = version
        self.models = {version: model}
        """The models of the versions that are alive."""
        self._buffer: dict[int, VersionSum] = {}
        self.contributions = Contributions(once=not settings.devices.device_reuse, used=used)
        self.contributions.begin(version)
        self._deal = Deal(settings.devices.device_sampling_strategy, generator)
        self._begun = False
        self.refused: list[str] = []
        """Why partial sums were refused, since somebody last looked."""
        self.late = 0
        """Contributions that came after their version was over."""
        self._last: dict[str, int] = {}

    @property
    def buffered(self) -> int:
        """Updates in the buffer."""
        return sum(one.count for one in self._buffer.values())

    @property
    def full(self) -> bool:
        """Whether the buffer holds enough for the next version."""
        return not self.over and self.buffered >= self._settings.models.num_updates_for_model

    @property
    def over(self) -> bool:
        """Whether the last version is made."""
        return self.version >= self._settings.models.max_model_version

    @property
    def waiting(self) -> int:
        """Devices that wait for a task."""
        return self._deal.waiting

    @property
    def under_way(self) -> int:
        """Tasks that devices have."""
        return self._deal.under_way

    def merge(self, partial: PartialSum) -> bool:
        """Take a child's partial sum, once, in order; False if it was refused, or had come before."""
        if partial.sequence <= self._last.get(partial.origin, -1):
            return False
        self._last[partial.origin] = partial.sequence
        why = self.contributions.deliver(partial)
        if why is not None:
            self.refused.append(why)
            return False
        for version, part in partial.versions.items():
            if version not in self.models:
                self.late += part.count
                continue
            total = self._buffer.get(version)
            if total is None:
                total = self._buffer[version] = VersionSum(self._floats)
            total.merge(part)
        return True

    def demand(self, child: str, demand: Demand) -> int:
        """A child's demand; how many permits it has been granted since its start."""
        self._deal.report(child, demand)
        self._deal_out()
        return self._deal.granted_to(child)

    def drop(self, child: str) -> None:
        """A child is gone; its permits go to others. Whether anything of it is lost shows when its versions end."""
        self._deal.drop(child)

    def _deal_out(self) -> None:
        devices = self._settings.devices
        self._begun = self._begun or self._deal.children >= devices.initial_min_client_num
        holes = devices.device_selection_size - self._deal.under_way
        if self._begun and not self.over and holes >= devices.min_hole_to_fill:
            self._deal.give(holes)

    def step(self) -> Step | None:
        """Make the next version if the buffer is full; None if it is not, or the last version is made."""
        if not self.full:
            return None
        models = self._settings.models
        weight = sum(one.weight for one in self._buffer.values())
        scales = {v: models.weight_of(self.version - v) * models.global_lr / weight for v in self._buffer}
        following = self._stepped(scales, weight)
        staleness = {self.version - v: one.count for v, one in sorted(self._buffer.items(), reverse=True)}
        updates = self.buffered
        self._buffer.clear()
        self.version += 1
        self.models[self.version] = following
        self.contributions.begin(self.version)
        lost: Counter[str] = Counter()
        for version in [v for v in self.models if self.version - v >= models.versions_alive]:
            self.models.pop(version).close()
            lost += self.contributions.end(version)
        return Step(self.version, updates, weight, staleness, dict(lost))

    def _stepped(self, scales: Mapping[int, float], weight: float) -> SealedMemory:
        current = self.models[self.version]
        file = parse(current.view, max_size=current.size)
        header, offsets, size = layout(self._schema)
        privacy, lr = self._settings.privacy, self._settings.models.global_lr
        with DraftMemory(size) as draft:
            draft.view[: len(header)] = header
            for name, spec in self._schema.items():
                at = offsets[name]
                if name not in self._floats:
                    draft.view[at : at + spec.size] = file.bytes_of(name)
                    continue
                found = file.array(name)
                values = (widen_bf16(found) if spec.dtype == "BF16" else found).astype(np.float64)
                for version, scale in scales.items():
                    values += self._buffer[version].sums[name] * scale
                if privacy is not None and self._noise is not None:
                    spread = privacy.noise_multiplier * privacy.clip_norm * lr / weight
                    values += self._noise(spec.elements).reshape(spec.shape) * spread
                target = np.frombuffer(draft.view, NUMPY_DTYPE[spec.dtype], spec.elements, at)
                target[:] = as_dtype(values.reshape(-1), spec.dtype)
                del target
            return SealedMemory(*draft.seal())

    def close(self) -> None:
        """Give the memory of all models back."""
        for model in self.models.values():
            model.close()
        self.models.clear()
