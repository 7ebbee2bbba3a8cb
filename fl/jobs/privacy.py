"""The trusted loop's settings: training with record-level differential privacy, by code of the site's alone."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class DpSgd(BaseModel):
    """DP-SGD (Abadi et al. 2016) over a model's graph, `steps` steps a round, by the site's own loop.

    In each step every record takes part with probability `sample_rate`, by itself (Poisson sampling). Each record's
    gradient is scaled to an L2 norm of at most `max_grad_norm`; to their sum comes Gaussian noise of `noise_multiplier`
    times that; the sum is divided by `expected_batch`, a constant (about `sample_rate` times the records of a site).
    `data` is a safetensors file of the site with the tensors `features` [records, ...] and `labels` [records, ...].
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    data: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")
    features: str = Field(default="features", min_length=1, max_length=128)
    labels: str = Field(default="labels", min_length=1, max_length=128)
    loss: Literal["cross_entropy", "mse", "bce_with_logits"]
    steps: int = Field(ge=1, le=100_000)
    sample_rate: float = Field(gt=0, le=1)
    expected_batch: float = Field(gt=0, le=1e9)
    learning_rate: float = Field(gt=0, le=1e3)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    max_grad_norm: float = Field(gt=0, le=1e6)
    noise_multiplier: float = Field(gt=0.1, le=1e3)
    delta: float = Field(gt=1e-12, lt=0.1)
