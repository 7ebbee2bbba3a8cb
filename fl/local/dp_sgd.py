"""The trusted loop: DP-SGD (Abadi et al. 2016, Algorithm 1) over a graph that is data.

Runs in a site's sandbox in place of a training script: no code of the bundle's is there, only its graph
(`fl.local.graph`). Each record's gradient is taken by itself (torch.func: grad under vmap), so no operation sees two
records; what is no number counts as 0; it is clipped, summed, and noised from the kernel's randomness.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fl.errors import RecipeUnusable
from fl.guard.keystream import KEY_SIZE, Keystream
from fl.jobs.privacy import DpSgd
from fl.jobs.settings import JobSettings
from fl.local.graph import Graph, parse_graph

if TYPE_CHECKING:
    import torch

CHUNK: Final = 64
"""Records whose gradients are held at once."""
LOOP: Final = "loop.py"
GRAPH: Final = "graph.json"
SETTINGS: Final = "privacy.json"
Tensors = Mapping[str, "torch.Tensor"]


def what_runs(files: Mapping[str, bytes], settings: JobSettings, script: str) -> tuple[Mapping[str, bytes], str]:
    """The files that a sandbox holds, and the script among them: a bundle's own with `script`, or in their place the
    trusted loop with the bundle's graph. Raises RecipeUnusable if that is none."""
    if settings.privacy is None:
        return files, script
    graph = files[settings.train_script]
    if set(parse_graph(graph).parameters.values()) != set(settings.model):
        raise RecipeUnusable("the graph's parameters are not the model's", where="graph")
    start = b"from fl.local.dp_sgd import main\n\nmain()\n"
    return {LOOP: start, GRAPH: graph, SETTINGS: settings.privacy.model_dump_json().encode()}, LOOP


def main() -> None:
    """Take part in a job: train each round's model privately, and send the parameters."""
    from fl import client as flare
    from fl.model import params_of
    from fl.tensors import parse

    folder = Path(sys.argv[0]).parent
    privacy = DpSgd.model_validate(json.loads((folder / SETTINGS).read_bytes()))
    graph = parse_graph((folder / GRAPH).read_bytes())
    flare.init()
    raw = flare.data_path(privacy.data).read_bytes()
    tensors = params_of(parse(bytearray(raw), max_size=len(raw), where=privacy.data), "pytorch")
    features, labels = tensors[privacy.features], tensors[privacy.labels]
    while flare.is_running():
        received = flare.receive()
        if received is None:
            return
        trained = train(graph, received.params, features, labels, privacy)
        flare.send(flare.FLModel(params=trained))


def train(
    graph: Graph,
    parameters: Tensors,
    features: torch.Tensor,
    labels: torch.Tensor,
    privacy: DpSgd,
    random: Callable[[int], bytes] = os.urandom,
) -> dict[str, torch.Tensor]:
    """The parameters after `privacy.steps` steps. `features` and `labels` are [records, ...]; parameters float32.

    Raises RecipeUnusable if the data do not fit.
    """
    import torch

    if len(features) != len(labels):
        raise RecipeUnusable("there are not as many labels as records", where=privacy.data)
    stream = Keystream(random(KEY_SIZE))
    current = {name: tensor.clone() for name, tensor in parameters.items()}
    velocity = {name: torch.zeros_like(tensor) for name, tensor in current.items()}
    gradients = per_record_gradients(graph, privacy)
    for _ in range(privacy.steps):
        drawn = np.flatnonzero(stream.words(len(features)).astype(np.float64) * 2.0**-64 < privacy.sample_rate)
        total = {name: torch.zeros_like(tensor) for name, tensor in current.items()}
        for start in range(0, len(drawn), CHUNK):
            rows = torch.from_numpy(drawn[start : start + CHUNK])
            clipped = clip(gradients(current, features[rows], labels[rows]), privacy.max_grad_norm)
            for name, gradient in clipped.items():
                total[name] += gradient.sum(dim=0)
        for name, tensor in current.items():
            noise = torch.from_numpy(stream.normal(tensor.numel())).reshape(tensor.shape)
            noisy = total[name] + (noise * (privacy.noise_multiplier * privacy.max_grad_norm)).to(tensor.dtype)
            velocity[name] = privacy.momentum * velocity[name] + noisy / privacy.expected_batch
            current[name] = tensor - privacy.learning_rate * velocity[name]
    return current


def per_record_gradients(
    graph: Graph, privacy: DpSgd
) -> Callable[[Tensors, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]:
    """A function of parameters, features and labels to each record's gradient: tensors of [records, *parameter]."""
    import torch
    from torch.nn import functional

    def loss(parameters: Tensors, example: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        output = graph.run(parameters, example.unsqueeze(0))
        if privacy.loss == "cross_entropy":
            return functional.cross_entropy(output, label.reshape(1))
        wanted = label.reshape(output.shape).to(output.dtype)
        if privacy.loss == "mse":
            return functional.mse_loss(output, wanted)
        return functional.binary_cross_entropy_with_logits(output, wanted)

    found: Any = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    return found  # type: ignore[no-any-return]


def clip(gradients: Tensors, most: float) -> dict[str, torch.Tensor]:
    """Each record's gradient, over all parameters, scaled to an L2 norm of at most `most`; 0 where it is no number.

    Without that, one record for which a graph overflows would move the sum without bound.
    """
    import torch

    known = {name: torch.nan_to_num(tensor, nan=0.0, posinf=0.0, neginf=0.0) for name, tensor in gradients.items()}
    squares = sum(tensor.to(torch.float64).flatten(1).square().sum(dim=1) for tensor in known.values())
    norms = torch.sqrt(torch.as_tensor(squares))
    factors = most / torch.clamp(norms, min=most)
    return {
        name: (tensor.to(torch.float64) * factors.reshape(-1, *[1] * (tensor.ndim - 1))).to(tensor.dtype)
        for name, tensor in known.items()
    }
