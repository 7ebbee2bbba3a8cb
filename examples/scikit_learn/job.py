"""A scikit-learn classifier over two hospitals by federated averaging, with the best model and an early stop.

First `python ../breast_cancer/prepare.py FOLDER` makes the hospitals' files; then `python job.py FOLDER` trains, and
compares with the same classifier on all patients together.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from scaling import scaled
from sklearn.linear_model import SGDClassifier

from fl import FedAvgRecipe, SimEnv

SITES = ["borealis-hospital", "cygnus-bio"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the folder that prepare.py made")
    parser.add_argument("--workspace", type=Path)
    arguments = parser.parse_args()

    recipe = FedAvgRecipe(
        name="scikit-learn",
        min_clients=2,
        num_rounds=20,
        initial_model={"coef": np.zeros((1, 30)), "intercept": np.zeros(1)},
        train_script="train.py",
        key_metric="accuracy",
        patience=6,
    )
    run = recipe.execute(SimEnv(clients=SITES, data=arguments.data, workspace_root=arguments.workspace))
    weights = load_file(run.get_result() / "best_model.safetensors")

    test = load_file(arguments.data / "owner" / "test.safetensors")
    features, labels = scaled(test["features"]), test["labels"]
    federated = ((features @ weights["coef"][0] + weights["intercept"][0] > 0) == labels).mean()
    files = [load_file(arguments.data / site / "train.safetensors") for site in SITES]
    pooled = SGDClassifier(loss="log_loss", alpha=1e-3, learning_rate="constant", eta0=0.02, random_state=0)
    pooled.fit(
        scaled(np.concatenate([file["features"] for file in files])), np.concatenate([file["labels"] for file in files])
    )
    print("status:", run.get_status())
    print("rounds:", len(run.metrics()))
    print(f"accuracy: {federated:.4f}")
    print(f"pooled_accuracy: {pooled.score(features, labels):.4f}")


if __name__ == "__main__":
    main()
