"""What an edge job decides, named as NVIDIA FLARE names it, with all its arguments; some values mean more here.

Raises RecipeUnusable with the argument that is wrong, wherever these are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fl.errors import RecipeUnusable

StalenessRule: TypeAlias = Literal["polynomial", "hinge"]
HINGE_AFTER: Final = 4
HINGE_SLOPE: Final = 10.0
MAX_VALUES: Final = 1_000_000
MAX_WEIGHT: Final = 1e9
_DO: Final = "Correct it; docs/reference/edge.md has each argument."


class Settings(BaseModel):
    """Strict, frozen, and wrong in one sentence."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="wrap")
    @classmethod
    def _in_one_sentence(cls, data: Any, handler: Callable[[Any], Self]) -> Self:
        try:
            made = handler(data)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join((cls.__name__, *map(str, first["loc"])))
            raise RecipeUnusable(f"{first['msg']} (got {first['input']!r:.80})", where=place, do=_DO) from error
        why = made.why_unusable()
        if why is not None:
            raise RecipeUnusable(why, where=cls.__name__, do=_DO)
        return made

    def why_unusable(self) -> str | None:
        """What is wrong with fields that are each right."""
        return None


class ModelManagerConfig(Settings):
    """How updates make versions of the model. The first model is version 1.

    - `max_num_active_model_versions`: so many versions, the newest, take updates at the same time.
    - `max_model_version`: the job ends when this version is made.
    - `update_timeout`: seconds after which a node at the latest hands up what it has.
    - `num_updates_for_model`: K of FedBuff: a new version is made of at least so many updates.
    - `max_model_history`: an update counts only if its version is younger than so many versions.
    - `staleness_weight`: how an update counts whose version is tau versions old. False: fully. True or "polynomial":
      1/sqrt(1 + tau) (Nguyen et al. 2022, section 5). "hinge": fully up to tau = 4, then 1/(10 (tau - 4) + 1)
      (Xie et al. 2019, section 5.2).
    - `global_lr`: the server's learning rate, eta_g.
    """

    max_num_active_model_versions: int = Field(default=3, ge=1, le=64)
    max_model_version: int = Field(default=20, ge=2, le=1_000_000)
    update_timeout: float = Field(default=5.0, gt=0, le=3600)
    num_updates_for_model: int = Field(default=100, ge=1, le=MAX_VALUES)
    max_model_history: int = Field(default=10, ge=1, le=64)
    staleness_weight: bool | StalenessRule = False
    global_lr: float = Field(default=0.01, gt=0, le=1e6)

    def weight_of(self, staleness: int) -> float:
        """What an update counts whose version is so many versions old."""
        if self.staleness_weight is False:
            return 1.0
        if self.staleness_weight == "hinge":
            return 1.0 if staleness <= HINGE_AFTER else 1 / (HINGE_SLOPE * (staleness - HINGE_AFTER) + 1)
        return 1 / math.sqrt(1 + staleness)

    @property
    def versions_alive(self) -> int:
        """How many versions take updates."""
        return min(self.max_num_active_model_versions, self.max_model_history)


class DeviceManagerConfig(Settings):
    """How many devices train at the same time, and which.

    - `device_selection_size`: so many devices have a task at the same time: the concurrency of FedBuff.
    - `initial_min_client_num`: no task is given before so many nodes are connected to the root.
    - `min_hole_to_fill`: new tasks are given when so many are free. 1: at once. `device_selection_size`: when all have
      come back, which is synchronous training.
    - `device_reuse`: False: a device contributes once in the whole job.
    - `device_sampling_strategy`: how tasks are dealt to nodes with devices that wait: "balanced": evenly over the
      nodes; "random": as if devices were drawn at random.
    """

    device_selection_size: int = Field(default=100, ge=1, le=MAX_VALUES)
    initial_min_client_num: int = Field(default=1, ge=1, le=10_000)
    min_hole_to_fill: int = Field(default=1, ge=1, le=MAX_VALUES)
    device_reuse: bool = True
    device_sampling_strategy: Literal["balanced", "random"] = "balanced"

    def why_unusable(self) -> str | None:
        """What is wrong with fields that are each right."""
        return (
            "min_hole_to_fill is more than device_selection_size"
            if self.min_hole_to_fill > self.device_selection_size
            else None
        )


class EvaluatorConfig(Settings):
    """How versions are evaluated at the root while the job runs.

    - `eval_frequency`: every so many versions.
    - `custom_dataset`: `{"data", "label"}`: numbers as nested lists, arrays or tensors, and a class for each.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    eval_frequency: int = Field(default=1, ge=1, le=1_000_000)
    custom_dataset: dict[str, Any]

    def why_unusable(self) -> str | None:
        """What is wrong with fields that are each right."""
        return None if set(self.custom_dataset) == {"data", "label"} else "custom_dataset has exactly data and label"


class DevicePrivacy(Settings):
    """Each device's contribution protected: clipped to the L2 norm `clip_norm`, all weights 1, noise at the root.

    Each version's sum gets Gaussian noise of standard deviation `noise_multiplier` times `clip_norm`.
    """

    clip_norm: float = Field(gt=0, le=1e6)
    noise_multiplier: float = Field(gt=0, le=1e3)
    delta: float = Field(default=1e-6, gt=0, lt=1)


class EdgeSettings(Settings):
    """All of an edge job.

    - `device_wait_timeout`: seconds without a device that asks after which the job stops.
    - `max_norm`: the L2 norm to which any one device's difference is scaled down; None: as it is.
    - `max_weight`: what any one device weighs at most.
    - `task_seconds`: a device has so long for a task.
    - `eval_frequency`: every so many versions are evaluated by what the bundle has for it; None: none.
    """

    models: ModelManagerConfig = ModelManagerConfig()
    devices: DeviceManagerConfig = DeviceManagerConfig()
    device_wait_timeout: Annotated[float, Field(gt=0, le=7 * 86400)] | None = None
    privacy: DevicePrivacy | None = None
    max_norm: Annotated[float, Field(gt=0, le=1e24)] | None = None
    max_weight: float = Field(default=1e6, gt=0, le=MAX_WEIGHT)
    task_seconds: float = Field(default=600.0, gt=0, le=7 * 86400)
    eval_frequency: Annotated[int, Field(ge=1, le=1_000_000)] | None = None

    def why_unusable(self) -> str | None:
        """What is wrong with fields that are each right."""
        if self.models.num_updates_for_model > self.devices.device_selection_size:
            return "num_updates_for_model is more than device_selection_size: no version would ever be complete"
        if self.privacy is not None and self.max_norm is not None:
            return "with privacy its clip_norm bounds devices: leave max_norm out"
        return None
