"""What the model's owner does with the result: measure it on the test set, beside training on all data pooled."""

from __future__ import annotations

from pathlib import Path

import torch
from network import Classifier, accuracy, standardise, train_epochs
from safetensors.torch import load_file


def report(result: Path, data: Path, *, epochs: int) -> dict[str, float]:
    """`accuracy` of the federated model and `pooled_accuracy` of one trained on the pooled data for as many epochs."""
    test = load_file(data / "owner" / "test.safetensors")
    features, labels = standardise(test["features"]), test["labels"]
    federated = Classifier()
    federated.load_state_dict(load_file(result / "model.safetensors"))
    sites = [load_file(path) for path in sorted(data.glob("*/train.safetensors"))]
    pooled = Classifier()
    train_epochs(
        pooled,
        standardise(torch.cat([site["features"] for site in sites])),
        torch.cat([site["labels"] for site in sites]),
        epochs=epochs,
        batch_size=16,
        seed=0,
    )
    return {"accuracy": accuracy(federated, features, labels), "pooled_accuracy": accuracy(pooled, features, labels)}
