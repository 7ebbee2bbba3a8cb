"""Train a classifier over two hospitals' patients, simulated on this machine.

First `python prepare.py FOLDER` makes the hospitals' files; then `python job.py FOLDER` trains and evaluates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from evaluate import report
from network import Classifier

from fl import FedAvgRecipe, SimEnv, add_experiment_tracking

SITES = ["borealis-hospital", "cygnus-bio"]
ROUNDS = 8
EPOCHS = 2


def make_recipe() -> FedAvgRecipe:
    """The job, to be executed anywhere."""
    recipe = FedAvgRecipe(
        name="breast-cancer",
        min_clients=2,
        num_rounds=ROUNDS,
        initial_model=Classifier(),
        train_script="train.py",
        train_args=f"--batch_size 16 --epochs {EPOCHS}",
    )
    add_experiment_tracking(recipe, tracking_type="tensorboard")
    return recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="the folder that prepare.py made")
    parser.add_argument("--workspace", type=Path)
    arguments = parser.parse_args()

    env = SimEnv(clients=SITES, data=arguments.data, workspace_root=arguments.workspace)
    run = make_recipe().execute(env)
    print("status:", run.get_status())
    print("result:", run.get_result())
    for name, value in report(run.get_result(), arguments.data, epochs=ROUNDS * EPOCHS).items():
        print(f"{name}: {value:.4f}")


if __name__ == "__main__":
    main()
