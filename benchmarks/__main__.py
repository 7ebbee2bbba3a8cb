"""`make bench`: each measurement beside what limits it on this machine. `python -m benchmarks NAME…` chooses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping

from benchmarks import broker, edge, edge_tree, federation, masking, production, simulation, verifier
from benchmarks.peers import compare, environments

MEASUREMENTS: dict[str, Callable[[], Mapping[str, object]]] = {
    "verifier": verifier.measure,
    "broker": broker.measure,
    "federation": federation.measure,
    "masking": masking.measure,
    "simulation": simulation.measure,
    "production": production.measure,
    "edge": edge.measure,
    "edge_tree": edge_tree.measure,
    "peers": compare.measure,
}

if __name__ == "__main__":
    chosen = sys.argv[1:] or [name for name in MEASUREMENTS if name != "peers" or environments.installed()]
    if unknown := [name for name in chosen if name not in MEASUREMENTS]:
        sys.exit(f"no such benchmark: {', '.join(unknown)} (there are: {', '.join(MEASUREMENTS)})")
    json.dump({name: MEASUREMENTS[name]() for name in chosen}, sys.stdout, indent=2)
    sys.stdout.write("\n")
