"""Split the Wisconsin diagnostic breast-cancer data (569 patients; scikit-learn carries it) over two hospitals.

The split is what federated learning meets: unequal in size and in what the patients have. `borealis-hospital` gets most
patients, mostly benign cases; `cygnus-bio` gets few, mostly malignant ones; the model's owner keeps a stratified fifth
to test with. Each file is safetensors with raw `features` [patients, 30] float32 and `labels` [patients] int64.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save
from sklearn.datasets import load_breast_cancer

SEED = 20
SHARE_OF_BOREALIS = {0: 0.5, 1: 0.8}
"""Of the malignant (0) and of the benign (1) training cases."""


def split(seed: int = SEED) -> dict[str, dict[str, npt.NDArray[np.generic]]]:
    """The three holders' patients, by file."""
    data = load_breast_cancer()
    features, labels = data.data.astype(np.float32), data.target.astype(np.int64)
    random = np.random.default_rng(seed)
    parts: dict[str, list[npt.NDArray[np.int64]]] = {
        "owner/test": [],
        "borealis-hospital/train": [],
        "cygnus-bio/train": [],
    }
    for label, share in SHARE_OF_BOREALIS.items():
        patients = random.permutation(np.flatnonzero(labels == label))
        test = round(len(patients) * 0.2)
        border = test + round((len(patients) - test) * share)
        for name, part in zip(parts, np.split(patients, [test, border]), strict=True):
            parts[name].append(part)
    return {
        name: {"features": features[rows], "labels": labels[rows]}
        for name, rows in ((name, random.permutation(np.concatenate(part))) for name, part in parts.items())
    }


def prepare(folder: Path, seed: int = SEED) -> None:
    """Write each holder's file under `folder`."""
    for name, arrays in split(seed).items():
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(save(dict(arrays)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    prepare(parser.parse_args().folder)
