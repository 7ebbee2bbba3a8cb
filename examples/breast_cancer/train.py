"""What runs at each site: train the global model on the site's own patients."""

from __future__ import annotations

import argparse

from network import Classifier, accuracy, standardise, train_epochs
from safetensors.torch import load_file

from fl import client as flare


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()

    flare.init()
    data = load_file(flare.data_path("train.safetensors"))
    features, labels = standardise(data["features"]), data["labels"]
    network = Classifier()
    while flare.is_running():
        received = flare.receive()
        network.load_state_dict(received.params)
        before = accuracy(network, features, labels)
        steps, loss = train_epochs(
            network,
            features,
            labels,
            epochs=arguments.epochs,
            batch_size=arguments.batch_size,
            seed=received.current_round,
        )
        flare.send(
            flare.FLModel(
                params=network.state_dict(),
                metrics={"accuracy": before, "loss": loss},
                meta={"NUM_STEPS_CURRENT_ROUND": steps},
            )
        )


if __name__ == "__main__":
    main()
