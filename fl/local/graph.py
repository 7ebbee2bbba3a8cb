"""A model as data: the stateless graph that torch.export makes of it, as JSON that names pure operations and no code.

`{"version": 1, "input", "nodes": [{"name", "op", "args"}], "output", "parameters": {placeholder: parameter}}`. A node's
argument is a number, a boolean, null, a list of such, or `{"ref": NAME}` of an earlier node. Only operations of
OPERATIONS may stand in it: all are functions of their arguments alone, without randomness, state or files, so that the
graph of one example sees that example and the parameters, and nothing else. Whoever reads a graph runs nothing of its
author's: that is what makes a loop over it one that a site can trust (`fl.local.dp_sgd`).
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from fl.errors import RecipeUnusable

if TYPE_CHECKING:
    import torch

MAX_GRAPH: Final = 4 << 20
MAX_NODES: Final = 20_000
MAX_DEPTH: Final = 3
"""Lists within lists."""
_ITEM: Final = "getitem"
OPERATIONS: Final = frozenset(
    {
        _ITEM, "_adaptive_avg_pool2d.default", "_log_softmax.default", "_softmax.default", "abs.default", "add.Scalar",
        "add.Tensor", "addmm.default", "amax.default", "avg_pool1d.default", "avg_pool2d.default", "bmm.default",
        "cat.default", "clamp.default", "clone.default", "convolution.default", "cos.default", "div.Scalar",
        "div.Tensor", "elu.default", "embedding.default", "erf.default", "exp.default", "expand.default",
        "gelu.default", "hardtanh.default", "leaky_relu.default", "log.default", "max_pool2d_with_indices.default",
        "maximum.default", "mean.dim", "minimum.default", "mm.default", "mul.Scalar", "mul.Tensor",
        "native_group_norm.default", "native_layer_norm.default", "neg.default", "permute.default",
        "pow.Tensor_Scalar", "relu.default", "rsqrt.default", "select.int", "sigmoid.default", "sin.default",
        "slice.Tensor", "sqrt.default", "squeeze.dim", "squeeze.dims", "sub.Scalar", "sub.Tensor", "sum.dim_IntList",
        "tanh.default", "unsqueeze.default", "view.default",
    }
)  # fmt: skip
"""Of torch's core ATen operators (docs: torch.compiler IRs), those that are pure and have a batching rule."""


@dataclass(frozen=True, slots=True)
class Node:
    """One operation; `args` hold `Ref`s to earlier results."""

    name: str
    op: str
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Ref:
    """The result of an earlier node, the input or a parameter."""

    name: str


@dataclass(frozen=True, slots=True)
class Graph:
    """A checked graph. `parameters` maps the graph's placeholders to the model's parameters."""

    parameters: Mapping[str, str]
    input: str
    nodes: tuple[Node, ...]
    output: str

    def run(self, parameters: Mapping[str, torch.Tensor], example: torch.Tensor) -> torch.Tensor:
        """The output for one example, [1, ...], as it was exported."""
        values: dict[str, Any] = {name: parameters[own] for name, own in self.parameters.items()}
        values[self.input] = example
        for node in self.nodes:
            arguments = [_filled(argument, values) for argument in node.args]
            values[node.name] = arguments[0][arguments[1]] if node.op == _ITEM else _operation(node.op)(*arguments)
        found: torch.Tensor = values[self.output]
        return found


def export_graph(model: torch.nn.Module, example: torch.Tensor) -> bytes:
    """The graph of `model` for one example, [1, ...], through torch.export.

    Raises RecipeUnusable for a model with state (batch normalisation), randomness (dropout in training mode) or an
    operation that is not in OPERATIONS.
    """
    import torch
    from torch.export.graph_signature import InputKind

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        exported = torch.export.export(model, (example,)).run_decompositions()
    parameters: dict[str, str] = {}
    inputs: list[str] = []
    for spec in exported.graph_signature.input_specs:
        if spec.kind is InputKind.PARAMETER and spec.target is not None:
            parameters[spec.arg.name] = spec.target
        elif spec.kind is InputKind.USER_INPUT:
            inputs.append(spec.arg.name)
        else:
            raise RecipeUnusable(f"the model has state of its own ({spec.target})", where="model", do=_DO)
    nodes: list[dict[str, Any]] = []
    output = ""
    for node in exported.graph.nodes:
        if node.op == "call_function":
            name = _ITEM if node.target.__name__ == _ITEM else str(node.target).removeprefix("aten.")
            if node.kwargs and any(value is not None for value in node.kwargs.values()):
                raise RecipeUnusable(f"the operation {name} has keyword arguments", where="model", do=_DO)
            nodes.append({"name": node.name, "op": name, "args": [_encoded(argument) for argument in node.args]})
        elif node.op == "output":
            (results,) = node.args
            if len(results) != 1:
                raise RecipeUnusable("the model has more than one output", where="model", do=_DO)
            output = results[0].name
    if len(inputs) != 1:
        raise RecipeUnusable("the model has more than one input", where="model", do=_DO)
    document = {"version": 1, "input": inputs[0], "nodes": nodes, "output": output, "parameters": parameters}
    raw = json.dumps(document, separators=(",", ":"), sort_keys=True).encode()
    parse_graph(raw)
    return raw


_DO: Final = (
    "Use a stateless model of plain layers, exported in eval mode; docs/reference/recipes.md, Private training."
)


def parse_graph(raw: bytes) -> Graph:
    """Check a whole graph. Raises RecipeUnusable for every deviation."""
    if len(raw) > MAX_GRAPH:
        raise _wrong(f"it has {len(raw)} bytes, more than {MAX_GRAPH}")
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _wrong("it is not JSON") from error
    if not isinstance(document, dict) or set(document) != {"version", "input", "nodes", "output", "parameters"}:
        raise _wrong("it has not exactly version, input, nodes, output and parameters")
    parameters, nodes = document["parameters"], document["nodes"]
    if document["version"] != 1 or not isinstance(parameters, dict) or not isinstance(nodes, list):
        raise _wrong("it is of another version, or its parts are of other types")
    if len(nodes) > MAX_NODES or not all(_is_name(name) for name in (*parameters, *parameters.values())):
        raise _wrong(f"it has more than {MAX_NODES} nodes, or a parameter that is no name")
    if not _is_name(document["input"]) or document["input"] in parameters:
        raise _wrong("its input is no name of its own")
    known = {*parameters, document["input"]}
    found = []
    for node in nodes:
        if not isinstance(node, dict) or set(node) != {"name", "op", "args"} or not _is_name(node["name"]):
            raise _wrong("a node has not exactly name, op and args")
        if node["name"] in known:
            raise _wrong(f"{node['name']!r:.80} is defined twice")
        if node["op"] not in OPERATIONS or not isinstance(node["args"], list):
            raise _wrong(f"the operation {node['op']!r:.80} may not stand in a graph")
        arguments = tuple(_decoded(argument, known, 0) for argument in node["args"])
        if node["op"] == _ITEM and not (
            len(arguments) == 2 and isinstance(arguments[0], Ref) and arguments[1] in (0, 1, 2)
        ):
            raise _wrong("an item is not one of the first three of an earlier result")
        found.append(Node(node["name"], node["op"], arguments))
        known.add(node["name"])
    if document["output"] not in known:
        raise _wrong("its output is not one of its nodes")
    return Graph(parameters, document["input"], tuple(found), document["output"])


def _wrong(what: str) -> RecipeUnusable:
    return RecipeUnusable(f"this is no graph: {what}", where="graph", do="Make it: fl.local.graph.export_graph.")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 256 and value.isprintable()


def _encoded(argument: Any) -> Any:
    if isinstance(argument, list | tuple):
        return [_encoded(one) for one in argument]
    if argument is None or isinstance(argument, bool | int | float):
        return argument
    if hasattr(argument, "name") and hasattr(argument, "op"):
        return {"ref": argument.name}
    raise RecipeUnusable(f"an operation has an argument that is a {type(argument).__name__}", where="model", do=_DO)


def _decoded(argument: Any, known: set[str], depth: int) -> Any:
    if (
        argument is None
        or isinstance(argument, bool | float)
        or (isinstance(argument, int) and abs(argument) < 1 << 62)
    ):
        return argument
    if isinstance(argument, list) and depth < MAX_DEPTH and len(argument) <= MAX_NODES:
        return [_decoded(one, known, depth + 1) for one in argument]
    if isinstance(argument, dict) and set(argument) == {"ref"} and isinstance(argument["ref"], str):
        if argument["ref"] in known:
            return Ref(argument["ref"])
        raise _wrong("an argument refers to what comes later or nowhere")
    raise _wrong("an argument is neither number, boolean, null, list nor reference")


def _filled(argument: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(argument, Ref):
        return values[argument.name]
    if isinstance(argument, list):
        return [_filled(one, values) for one in argument]
    return argument


def _operation(name: str) -> Callable[..., Any]:
    """The ATen operation of a name that `parse_graph` has found in OPERATIONS."""
    import torch

    packet, _, overload = name.partition(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
    return found
