"""Logistic regression over two hospitals by Newton's method: the weights are those of the pooled data.

First `python ../breast_cancer/prepare.py FOLDER` makes the hospitals' files; then `python job.py FOLDER` trains and
compares with scikit-learn on all patients together.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file
from scaling import MEAN, SCALE
from sklearn.linear_model import LogisticRegression

from fl import FedAvgLrRecipe, SimEnv

SITES = ["borealis-hospital", "cygnus-bio"]
L2 = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, help="the folder that prepare.py made")
    parser.add_argument("--workspace", type=Path)
    arguments = parser.parse_args()

    recipe = FedAvgLrRecipe(
        name="logistic-regression", num_features=30, min_clients=2, num_rounds=8, l2=L2, train_script="train.py"
    )
    run = recipe.execute(SimEnv(clients=SITES, data=arguments.data, workspace_root=arguments.workspace))
    weights = load_file(run.get_result() / "model.safetensors")["weights"]

    files = [load_file(arguments.data / site / "train.safetensors") for site in SITES]
    features = (np.concatenate([file["features"] for file in files]).astype(np.float64) - MEAN) / SCALE
    labels = np.concatenate([file["labels"] for file in files])
    pooled = LogisticRegression(C=1 / (L2 * len(labels)), solver="newton-cholesky", tol=1e-10).fit(features, labels)
    reference = np.append(pooled.coef_[0], pooled.intercept_)

    test = load_file(arguments.data / "owner" / "test.safetensors")
    scores = (test["features"].astype(np.float64) - MEAN) / SCALE @ weights[:-1] + weights[-1]
    print("status:", run.get_status())
    print(f"largest difference from the pooled weights: {np.abs(weights - reference).max():.1e}")
    print(f"accuracy: {((scores > 0) == test['labels']).mean():.4f}")


if __name__ == "__main__":
    main()
