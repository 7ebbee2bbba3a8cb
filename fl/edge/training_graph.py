"""Exporting a training graph: forward pass, loss and gradients as one ExecuTorch program, for any device to train.

The program holds the model's first parameters; a device sets those of the version that it trains. Parameters alone are
trained: a model with buffers that training changes (batch normalisation's statistics) cannot be exported.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Final

from policies.errors import Unusable

if TYPE_CHECKING:
    import torch

WRAPPER: Final = "net."
"""What the graph's parameter names have before the model's own."""


def export_training_graph(
    net: torch.nn.Module, loss: torch.nn.Module, inputs: torch.Tensor, labels: torch.Tensor
) -> bytes:
    """The program (.pte) whose method `forward(inputs, labels)` returns (loss, outputs) and gives gradients.

    `inputs` and `labels` are examples of one batch: shapes and dtypes are fixed by them. Raises Unusable if the package
    `executorch` is missing, or the model cannot be exported.
    """
    import torch

    class Training(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.loss = loss

        def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            outputs = self.net(inputs)
            return self.loss(outputs, labels), outputs.detach()

    if any(True for _ in net.buffers()):
        raise Unusable("the model has buffers, which devices cannot train", where="model", do="Use layers without.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ExecuTorch's own use of what Python and PyTorch will drop
            from executorch.exir import to_edge
            from torch.export.experimental import _export_forward_backward

            exported = torch.export.export(Training(), (inputs, labels), strict=True)
            return bytes(to_edge(_export_forward_backward(exported)).to_executorch().buffer)
    except ImportError as error:
        raise Unusable("ExecuTorch is not installed", where="export", do="pip install 'sealwright[edge]'.") from error
    except (RuntimeError, ValueError, TypeError) as error:
        raise Unusable(
            f"the model cannot be exported: {str(error).splitlines()[0][:200]}",
            where="model",
            do="Use operations that torch.export takes, for this batch's shapes.",
        ) from error
