"""A hospital's part with scikit-learn: one epoch of stochastic gradient descent from the global coefficients."""

from __future__ import annotations

import numpy as np
from safetensors.numpy import load_file
from scaling import scaled
from sklearn.linear_model import SGDClassifier

from fl import client as flare


def main() -> None:
    flare.init()
    data = load_file(flare.data_path("train.safetensors"))
    features, labels = scaled(data["features"]), data["labels"]
    model = SGDClassifier(loss="log_loss", alpha=1e-3, learning_rate="constant", eta0=0.02, random_state=0)
    model.partial_fit(features[:1], labels[:1], classes=np.array([0, 1]))  # gives it its shape
    while flare.is_running():
        received = flare.receive()
        model.coef_, model.intercept_ = received.params["coef"].copy(), received.params["intercept"].copy()
        accuracy = model.score(features, labels)  # of the model that was received
        model.partial_fit(features, labels)
        flare.send(
            flare.FLModel(
                params={"coef": model.coef_, "intercept": model.intercept_},
                metrics={"accuracy": accuracy},
                meta={"NUM_STEPS_CURRENT_ROUND": len(labels)},
            )
        )


if __name__ == "__main__":
    main()
