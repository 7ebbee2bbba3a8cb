"""The vectors that keep the device kits equal are what the reference's code makes, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

VECTORS = Path(__file__).parent / "vectors"


def test_the_vectors_are_what_the_reference_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "fl.edge.kits.vectors", str(tmp_path)], check=True, timeout=120)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_bytes() for path in VECTORS.iterdir()}
    assert made.keys() == kept.keys()
    for name, content in kept.items():
        assert made[name] == content, f"{name}: python -m fl.edge.kits.vectors tests/fl/edge/vectors"
