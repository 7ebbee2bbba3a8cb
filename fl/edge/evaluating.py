"""The evaluation of an edge job's versions: the network as data, test examples, and the loop that measures accuracy.

Both are files of the bundle. The server runs the loop in a sandbox, without network or data of its own; what runs there
is ours, over a graph of pure operations (`fl.local.graph`): no code of the author's.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from fl.edge.settings import EvaluatorConfig
from fl.errors import RecipeUnusable

if TYPE_CHECKING:
    import torch

    from fl.local.graph import Graph

GRAPH_FILE: Final = "evaluation.graph.json"
DATA_FILE: Final = "evaluation.safetensors"
LOOP_FILE: Final = "evaluation.py"
LOOP: Final = b"from fl.edge.evaluating import main\n\nmain()\n"
METRIC: Final = "accuracy"
BATCH: Final = 256


def examples_of(evaluator: EvaluatorConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """The examples, float32 [n, ...], and their classes, int64 [n]. Raises RecipeUnusable."""
    import torch

    try:
        inputs = torch.as_tensor(evaluator.custom_dataset["data"], dtype=torch.float32)
        labels = torch.as_tensor(evaluator.custom_dataset["label"], dtype=torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RecipeUnusable(f"the test data are no numbers: {error}", where="evaluator_config") from error
    if inputs.ndim < 1 or labels.ndim != 1 or len(inputs) != len(labels) or not len(labels):
        raise RecipeUnusable(
            f"the test data are {list(inputs.shape)}, their labels {list(labels.shape)}: give one label for each row",
            where="evaluator_config",
        )
    return inputs, labels


def evaluation_files(net: torch.nn.Module, evaluator: EvaluatorConfig) -> dict[str, bytes]:
    """What a bundle holds so that the root can evaluate. Raises RecipeUnusable for a network that is no plain graph."""
    from fl.local.graph import export_graph
    from fl.model import tensors_of
    from fl.tensors import encode

    inputs, labels = examples_of(evaluator)
    training = net.training
    try:
        graph = export_graph(net.eval(), inputs[:1])
    finally:
        net.train(training)
    return {GRAPH_FILE: graph, DATA_FILE: encode(tensors_of({"data": inputs.numpy(), "label": labels.numpy()}))}


def accuracy(graph: Graph, parameters: dict[str, torch.Tensor], inputs: torch.Tensor, labels: torch.Tensor) -> float:
    """The part of the examples whose largest output is that of their class."""
    import torch

    def output(example: torch.Tensor) -> torch.Tensor:
        return graph.run(parameters, example.unsqueeze(0)).reshape(-1)

    outputs: Any = torch.func.vmap(output)
    right = 0
    with torch.no_grad():
        for at in range(0, len(labels), BATCH):
            right += int((outputs(inputs[at : at + BATCH]).argmax(dim=1) == labels[at : at + BATCH]).sum())
    return right / len(labels)


def main() -> None:
    """Measure each model that comes, until the job is over. In a sandbox."""
    from fl import client
    from fl.local.graph import parse_graph
    from fl.model import params_of
    from fl.tensors import parse

    folder = Path(sys.argv[0]).parent
    graph = parse_graph((folder / GRAPH_FILE).read_bytes())
    raw = (folder / DATA_FILE).read_bytes()
    data = params_of(parse(bytearray(raw), max_size=len(raw), where=DATA_FILE), "pytorch")
    client.init()
    while (received := client.receive()) is not None:
        measured = accuracy(graph, dict(received.params), data["data"], data["label"])
        client.send(client.FLModel(metrics={METRIC: measured}))


def is_accuracy(value: object) -> bool:
    """Whether a sandbox's answer can be one."""
    return isinstance(value, float) and math.isfinite(value) and 0 <= value <= 1
