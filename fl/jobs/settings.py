"""A job's settings: what a recipe decides, what a reviewer reads, and what server and sites follow."""

from __future__ import annotations

from typing import Annotated, Final, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from fl.aggregation.deltas import SCALE, Delta, encoded_schema
from fl.edge.settings import EdgeSettings
from fl.jobs.large_files import MAX_BYTES, MAX_LARGE, LargeFile
from fl.jobs.outputs import Outputs
from fl.jobs.privacy import DpSgd
from fl.tensors import FLOATS, ITEM_SIZE, MAX_NAME, MAX_RANK, Schema, TensorSpec

NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,62}$"
Name: TypeAlias = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Digest: TypeAlias = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]

MAX_MODEL: Final = 1 << 40
"""No model of a job is larger, in bytes."""

MASKED: Final = "masked"
MASKED_TAIL: Final = "tail"
"""The tensors of a masked update: the model's numbers, and the metrics with the weight."""

TaskKind: TypeAlias = Literal["train", "evaluate", "submit_model"]
"""What a script is asked for: an update of the model; metrics of it and nothing else; the site's own last model."""
Tracking: TypeAlias = Literal["tensorboard", "mlflow"]
Words: TypeAlias = Annotated[tuple[Annotated[str, Field(max_length=4096)], ...], Field(max_length=256, strict=False)]
FilterName: TypeAlias = Annotated[
    str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$", max_length=200)
]
"""`module:function` of the bundle."""


class TensorSettings(BaseModel):
    """One tensor of the model: safetensors dtype and shape."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    dtype: str
    shape: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 48)], ...], Field(max_length=MAX_RANK, strict=False)]

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.dtype not in ITEM_SIZE:
            raise ValueError(f"dtype {self.dtype!r} may not travel")
        return self


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FedProxOptions(_Options):
    """What FedProx needs to know: the weight `mu` of the proximal term."""

    recipe: Literal["fedprox"] = "fedprox"
    mu: float = Field(ge=0, le=1e6)


class FedOptOptions(_Options):
    """What FedOpt needs to know: the server's optimizer and its constants, as Reddi et al. name them."""

    recipe: Literal["fedopt"] = "fedopt"
    optimizer: Literal["sgd", "adam", "yogi"]
    lr: float = Field(gt=0, le=1e6)
    momentum: float = Field(ge=0, lt=1)
    beta1: float = Field(ge=0, lt=1)
    beta2: float = Field(ge=0, lt=1)
    tau: float = Field(gt=0, le=1e6)


class CyclicOptions(_Options):
    """What cyclic weight transfer needs to know: whether the order is fixed, or drawn anew each round from `seed`."""

    recipe: Literal["cyclic"] = "cyclic"
    order: Literal["fixed", "random"]
    seed: int = Field(ge=0, lt=1 << 32)


class ScaffoldOptions(_Options):
    """What SCAFFOLD needs to know: the server's step size, eta_g in the paper."""

    recipe: Literal["scaffold"] = "scaffold"
    lr: float = Field(gt=0, le=1e6)


class NewtonOptions(_Options):
    """What Newton's method needs to know: the part of each step that is taken, and the L2 penalty."""

    recipe: Literal["lr-newton"] = "lr-newton"
    damping_factor: float = Field(gt=0, le=1)
    l2: float = Field(ge=0, le=1e6)


class FedStatsOptions(_Options):
    """What federated statistics need to know: the features, in order, and how many records are enough to tell of."""

    recipe: Literal["fedstats"] = "fedstats"
    features: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
        Field(min_length=1, max_length=10_000, strict=False),
    ]
    min_count: int = Field(ge=2, le=1_000_000)

    @model_validator(mode="after")
    def _unambiguous(self) -> Self:
        for name in self.features:
            if "/" in name or not name.isprintable():
                raise ValueError(f"a feature may not be named {name!r}")
        if len(set(self.features)) != len(self.features):
            raise ValueError("a feature is named twice")
        return self


class FedEvalOptions(_Options):
    """An evaluation has nothing to be told but its model."""

    recipe: Literal["fedeval"] = "fedeval"


class FedBuffOptions(_Options):
    """What an edge job needs to know: its settings, and the configuration of the device task.

    The job's `train_script` is the training graph (`fl.edge.training_graph`).
    """

    recipe: Literal["fedbuff"] = "fedbuff"
    edge: EdgeSettings
    config: Annotated[
        dict[Annotated[str, Field(min_length=1, max_length=128)], bool | int | float | str], Field(max_length=64)
    ] = {}


class Selection(_Options):
    """How rounds are judged: by the mean of one metric of the model that the sites received in them.

    `patience`: the job ends after so many rounds without a better one; `stop_at`: with the first round whose metric
    reaches this.
    """

    metric: str = Field(min_length=1, max_length=128)
    mode: Literal["max", "min"] = "max"
    patience: int | None = Field(default=None, ge=1, le=100_000)
    stop_at: float | None = None

    def better(self, value: float, than: float | None) -> bool:
        """Whether `value` beats `than`."""
        return than is None or (value > than if self.mode == "max" else value < than)

    def reached(self, value: float) -> bool:
        """Whether `value` ends the job."""
        return self.stop_at is not None and (value >= self.stop_at if self.mode == "max" else value <= self.stop_at)


class SiteSettings(_Options):
    """What one site does otherwise than the others: its script, its command line."""

    train_script: str | None = Field(default=None, min_length=1, max_length=1024)
    train_args: Words | None = None


class Filters(_Options):
    """Functions of the bundle that a script's client API applies to what it receives and to what it sends, in order."""

    receive: Annotated[tuple[FilterName, ...], Field(max_length=16, strict=False)] = ()
    send: Annotated[tuple[FilterName, ...], Field(max_length=16, strict=False)] = ()


Options: TypeAlias = (
    FedProxOptions
    | FedOptOptions
    | CyclicOptions
    | ScaffoldOptions
    | NewtonOptions
    | FedStatsOptions
    | FedEvalOptions
    | FedBuffOptions
)


class NormClipping(_Options):
    """Differences scaled to an L2 norm of at most `norm` (None: the median of a round's)."""

    rule: Literal["norm-clipping"] = "norm-clipping"
    norm: float | None = Field(default=None, gt=0, le=1e9)


class TrimmedMean(_Options):
    """Each number's mean without the `trim` part of updates at each end."""

    rule: Literal["trimmed-mean"] = "trimmed-mean"
    trim: float = Field(gt=0, lt=0.5)


class Krum(_Options):
    """The mean of the `keep` updates that are nearest to the others, where up to `byzantine` are bad."""

    rule: Literal["krum"] = "krum"
    byzantine: int = Field(ge=1, le=1000)
    keep: int = Field(default=1, ge=1, le=1000)


Robust: TypeAlias = NormClipping | TrimmedMean | Krum


class SecureAggregation(_Options):
    """The server sees the sum over at least `min_members` members' sites (None: more than half of the roster's).

    Numbers of an update's difference from the model lie between -limit and limit. Under masks they have `bits`: with 32
    the first round has 64, and what is learned of its weights says how fine the steps of later ones can be
    (`fl.aggregation.fixed_point`); with 64 all have.
    """

    limit: float = Field(default=16.0, gt=0, le=1e6)
    bits: Literal[32, 64] = 32
    min_members: int | None = Field(default=None, ge=2, le=255)


class Watermark(_Options):
    """The model that a site is handed names that site (`fl.guard.watermark`): its numbers are moved by `strength` times
    their tensor's root mean square."""

    strength: float = Field(default=0.01, gt=0, le=0.1)


PRIVATE: Final = frozenset(
    {
        "name", "recipe", "options", "num_rounds", "min_clients", "train_script", "framework", "model",
        "round_seconds", "outputs", "privacy", "secure_aggregation", "robust",
    }
)  # fmt: skip
"""The settings that a private training may have; all others are as they are by default."""


class JobSettings(BaseModel):
    """Everything about a job but its code, its first model and where it runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    name: Name
    recipe: Literal["fedavg", "fedprox", "fedopt", "cyclic", "scaffold", "lr-newton", "fedstats", "fedeval", "fedbuff"]
    options: Annotated[Options, Field(discriminator="recipe")] | None = None
    """What this recipe has beyond the others; None for FedAvg, which has nothing."""
    num_rounds: int = Field(ge=1, le=100_000)
    min_clients: int = Field(ge=1, le=10_000)
    train_script: str = Field(min_length=1, max_length=1024)
    train_args: Words = ()
    framework: Literal["numpy", "pytorch"]
    params_type: Literal["FULL", "DIFF"] = "FULL"
    delta: Delta | None = None
    """How the numbers of an update's difference travel, if not as they are (`fl.aggregation.deltas`)."""
    model: dict[Annotated[str, Field(min_length=1, max_length=MAX_NAME)], TensorSettings] = Field(max_length=100_000)
    round_seconds: int = Field(default=3600, ge=1, le=7 * 86400)
    tracking: Tracking | None = None
    outputs: Outputs = Outputs()
    privacy: DpSgd | None = None
    """With it `train_script` is a graph (`fl.local.graph`), which each site's own loop trains privately."""
    secure_aggregation: SecureAggregation | None = None
    robust: Annotated[Robust, Field(discriminator="rule")] | None = None
    """A rule that some bad updates cannot move far (`fl.aggregation.robust`), in the mean's place."""
    watermark: Watermark | None = None
    selection: Selection | None = None
    cross_site_evaluation: bool = False
    """After the rounds every site evaluates the global model and every site's own."""
    sites: Annotated[dict[Name, SiteSettings], Field(max_length=1000)] = {}
    filters: Filters = Filters()
    aggregator: str | None = Field(default=None, min_length=1, max_length=1024)
    """A script of the bundle that folds the updates in the mean's place."""
    files: Annotated[tuple[LargeFile, ...], Field(max_length=MAX_LARGE, strict=False)] = ()
    """What is beside the scripts and too large for the bundle (`fl.jobs.large_files`)."""

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if not self.model:
            raise ValueError("the model has no tensor")
        if (None if self.options is None else self.options.recipe) != (
            None if self.recipe == "fedavg" else self.recipe
        ):
            raise ValueError(f"options are not those of {self.recipe}")
        if isinstance(self.options, FedBuffOptions) and (
            self.num_rounds != self.options.edge.models.max_model_version - 1
            or self.min_clients != self.options.edge.devices.initial_min_client_num
        ):
            raise ValueError(
                "an edge job's rounds are its versions after the first, its clients the nodes to begin with"
            )
        if sum(spec.size for spec in self.schema_of_model.values()) > MAX_MODEL:
            raise ValueError(f"the model has more than {MAX_MODEL} bytes")
        if self.aggregator is not None and self.recipe not in {"fedavg", "fedprox"}:
            raise ValueError(f"{self.recipe} aggregates by its own rule: an aggregator of one's own is for fedavg")
        whole = [name for name, entry in self.model.items() if entry.dtype not in FLOATS]
        if self.outputs.transforms and whole:
            raise ValueError(
                f"tensor {whole[0]!r} is {self.model[whole[0]].dtype}: only floats can be clipped or rounded"
            )
        if sum(file.size for file in self.files) > MAX_BYTES:
            raise ValueError(f"the job's large files have more than {MAX_BYTES} bytes")
        if self.files and self.recipe == "fedbuff":
            raise ValueError("devices get a model and a graph, and no large files")
        if self.privacy is not None:
            self._check_private()
        if self.delta is not None:
            self._check_delta()
        if self.robust is not None:
            if self.recipe not in {"fedavg", "fedprox"} or self.aggregator is not None:
                raise ValueError("a robust rule takes the place of the mean of FedAvg and FedProx")
            if any(entry.dtype not in FLOATS for entry in self.model.values()):
                raise ValueError("a robust rule is for a model of floats")
        if self.secure_aggregation is not None:
            self._check_masked()
        if self.watermark is not None:
            self._check_marked()
        return self

    def _check_marked(self) -> None:
        if self.recipe not in {"fedavg", "fedprox"} or self.cross_site_evaluation:
            raise ValueError("watermarks are of FedAvg and FedProx, without an evaluation across sites")
        if self.params_type != "DIFF" and self.secure_aggregation is None:
            raise ValueError("with watermarks sites send differences (params_type DIFF), in which there are none")

    def _check_delta(self) -> None:
        if self.params_type != "DIFF" or self.recipe not in {"fedavg", "fedprox", "fedopt"}:
            raise ValueError("delta is of the differences (params_type DIFF) of FedAvg, FedProx and FedOpt")
        if self.aggregator is not None or self.robust is not None or self.secure_aggregation is not None:
            raise ValueError("delta is of a plain mean: no aggregator, no robust rule, no secure aggregation")
        if any(entry.dtype not in FLOATS for entry in self.model.values()):
            raise ValueError("delta is of a model of floats")
        if any(name.endswith(SCALE) for name in self.model):
            raise ValueError(f"with delta no tensor's name ends with {SCALE}")

    def _check_masked(self) -> None:
        single = self.aggregator is not None or self.cross_site_evaluation or self.robust is not None
        if self.recipe not in {"fedavg", "fedprox"} or single:
            raise ValueError(
                "secure aggregation is of the means of FedAvg and FedProx: whatever looks at single updates excludes it"
            )
        if any(entry.dtype not in FLOATS for entry in self.model.values()):
            raise ValueError("secure aggregation is of a model of floats")
        if self.outputs.metrics is None or self.outputs.values:
            raise ValueError("with secure aggregation metrics are declared by name, and none are logged")

    def _check_private(self) -> None:
        for name, field in type(self).model_fields.items():
            if name not in PRIVATE and getattr(self, name) != field.default:
                raise ValueError(f"private training has no {name}: the sites' own loop is all that runs")
        if self.framework != "pytorch" or any(entry.dtype != "F32" for entry in self.model.values()):
            raise ValueError("private training is of a torch model of float32")
        if self.recipe not in {"fedavg", "fedopt"}:
            raise ValueError("private training is of the recipes FedAvg and FedOpt")
        if self.outputs.metrics != () or self.outputs.values:
            raise ValueError("private training has no metrics: they would need noise of their own")

    @property
    def parameters(self) -> dict[str, float]:
        """The constants that a training script needs, which it finds in the `meta` of each model it receives."""
        if isinstance(self.options, FedProxOptions):
            return {"fedprox_mu": self.options.mu}
        if isinstance(self.options, FedStatsOptions):
            return {"fedstats_min_count": float(self.options.min_count)}
        return {}

    @property
    def scripts(self) -> frozenset[str]:
        """Every script of the bundle that the job starts."""
        own = {site.train_script for site in self.sites.values() if site.train_script is not None}
        return frozenset({self.train_script, *own, *([] if self.aggregator is None else [self.aggregator])})

    @property
    def filter_modules(self) -> frozenset[str]:
        """The top-level modules, of the bundle as a rule, that hold the filters."""
        return frozenset(
            name.partition(":")[0].partition(".")[0] for name in (*self.filters.receive, *self.filters.send)
        )

    def script_of(self, site: str) -> tuple[str, tuple[str, ...]]:
        """A site's script and its command line."""
        own = self.sites.get(site, SiteSettings())
        return own.train_script or self.train_script, self.train_args if own.train_args is None else own.train_args

    def asks_for(self, task: TaskKind, round_: int, sites: int) -> bool:
        """Whether the job may ask a site of so many for this task in this round.

        After the rounds of training come, where there is a cross-site evaluation, one in which sites hand over their
        own models and one for each model that is evaluated: the global one, the best if one is selected, every site's.
        """
        if 0 <= round_ < self.num_rounds:
            return task == ("evaluate" if self.recipe == "fedeval" else "train")
        models = 1 + (self.selection is not None) + sites
        if not self.cross_site_evaluation or not self.num_rounds <= round_ <= self.num_rounds + models:
            return False
        return task == ("submit_model" if round_ == self.num_rounds else "evaluate")

    @property
    def fixed_weight(self) -> bool:
        """Whether every update has the weight 1, whatever its script says."""
        return self.recipe == "fedstats" or self.privacy is not None

    @property
    def schema_of_update(self) -> Schema:
        """What a site delivers: the model's tensors, an encoded difference, or at most these masked vectors."""
        if self.delta is not None:
            return encoded_schema(self.schema_of_model, self.delta)
        return self.schema_of_sum

    @property
    def schema_of_sum(self) -> Schema:
        """What updates are sums of, once they are decoded: the model's tensors, or at most these masked vectors."""
        return self.schema_of_model if self.secure_aggregation is None else self.schema_of_masked(64)

    def schema_of_masked(self, bits: int) -> Schema:
        """What a site delivers under masks of so many bits."""
        elements = sum(spec.elements for spec in self.schema_of_model.values())
        return {
            MASKED: TensorSpec(f"U{bits}", (elements,)),
            MASKED_TAIL: TensorSpec("U64", (len(self.outputs.metrics or ()) + 1,)),
        }

    @property
    def schema_of_model(self) -> Schema:
        """The model's tensors, as the codec knows them."""
        return {name: TensorSpec(entry.dtype, entry.shape) for name, entry in self.model.items()}
