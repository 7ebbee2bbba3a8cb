"""Write the vectors into a folder, a canonical JSON file each."""

from __future__ import annotations

import argparse
from pathlib import Path

from attestation.canonical import canonical_bytes
from fl.edge.kits.vectors.sealed import sealing
from fl.edge.kits.vectors.tensors import deltas, safetensors
from fl.edge.kits.vectors.trusted import trust
from fl.edge.kits.vectors.words import json_forms, messages, protocol

FILES = {
    "protocol": protocol,
    "json": json_forms,
    "messages": messages,
    "sealing": sealing,
    "safetensors": safetensors,
    "deltas": deltas,
    "trust": trust,
}


def main() -> None:
    """Write each file."""
    parser = argparse.ArgumentParser(prog="python -m fl.edge.kits.vectors")
    parser.add_argument("out", type=Path)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, content in FILES.items():
        (out / f"{name}.json").write_bytes(canonical_bytes(content()))


if __name__ == "__main__":
    main()
