"""A site's part for each algorithm: the same steps of SGD, with what the algorithm adds to them."""

from __future__ import annotations

import argparse

import torch
from network import Network
from safetensors.torch import load_file

from fl import client as flare
from fl.local.fedprox import FedProxLoss
from fl.local.scaffold import ControlVariates


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--algorithm", default="fedavg")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=0.1)
    arguments = parser.parse_args()

    flare.init()
    data = load_file(flare.data_path("digits.safetensors"))
    network = Network()
    criterion = torch.nn.CrossEntropyLoss()
    variates = ControlVariates()
    while flare.is_running():
        received = flare.receive()
        params, proximal = received.params, None
        if arguments.algorithm == "scaffold":
            variates.receive(received)
            params = variates.params
        elif arguments.algorithm == "fedprox":
            proximal = FedProxLoss(received.meta["fedprox_mu"])
        network.load_state_dict(params)
        for _ in range(arguments.steps):
            network.zero_grad()
            loss = criterion(network(data["pixels"]), data["labels"])
            if proximal is not None:
                loss = loss + proximal(network, params)
            loss.backward()
            if arguments.algorithm == "scaffold":
                variates.correct(network)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter -= arguments.lr * parameter.grad
        metrics = {"loss": float(loss.detach())}
        if arguments.algorithm == "scaffold":
            flare.send(variates.answer(network.state_dict(), steps=arguments.steps, lr=arguments.lr, metrics=metrics))
        else:
            flare.send(flare.FLModel(params=network.state_dict(), metrics=metrics))


if __name__ == "__main__":
    main()
