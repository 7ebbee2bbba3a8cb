"""Handwritten digits over five sites that have two digits each: FedAvg, FedProx, FedOpt and SCAFFOLD side by side.

`python job.py` splits scikit-learn's digits, trains each algorithm in a simulation, and prints its accuracy on a fifth
of the images that no site has.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
from network import Network
from safetensors.numpy import save_file
from safetensors.torch import load_file
from sklearn.datasets import load_digits

from fl import FedAvgRecipe, FedOptRecipe, FedProxRecipe, ScaffoldRecipe, SimEnv

SITES = 5


def split(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Write each site's images of two digits under `folder`; the pixels and labels of the test images."""
    digits = load_digits()
    pixels, labels = (digits.data / 16).astype(np.float32), digits.target.astype(np.int64)
    test = np.random.default_rng(0).permutation(len(labels)) < len(labels) // 5
    for site in range(SITES):
        own = ~test & (labels // 2 == site)
        path = folder / f"site-{site + 1}" / "digits.safetensors"
        path.parent.mkdir(parents=True)
        save_file({"pixels": pixels[own], "labels": labels[own]}, path)
    return torch.from_numpy(pixels[test]), torch.from_numpy(labels[test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--workspace", type=Path)
    arguments = parser.parse_args()

    def job(algorithm: str) -> dict[str, object]:
        return {
            "name": f"digits-{algorithm}",
            "initial_model": Network(),
            "min_clients": SITES,
            "num_rounds": arguments.rounds,
            "train_script": "train.py",
            "train_args": f"--algorithm {algorithm}",
        }

    recipes = {
        "fedavg": FedAvgRecipe(**job("fedavg")),
        "fedprox": FedProxRecipe(mu=0.1, **job("fedprox")),
        "fedopt": FedOptRecipe(optimizer="yogi", lr=0.03, **job("fedopt")),
        "scaffold": ScaffoldRecipe(**job("scaffold")),
    }
    with tempfile.TemporaryDirectory() as folder:
        pixels, labels = split(Path(folder))
        for algorithm, recipe in recipes.items():
            run = recipe.execute(SimEnv(num_clients=SITES, data=folder, workspace_root=arguments.workspace))
            network = Network()
            network.load_state_dict(load_file(run.get_result() / "model.safetensors"))
            accuracy = (network(pixels).argmax(1) == labels).float().mean()
            print(f"{algorithm}: {float(accuracy):.4f}")


if __name__ == "__main__":
    main()
