"""`make bench`: each measurement beside what limits it on this machine."""

from __future__ import annotations

import json
import sys

from benchmarks import verifier

MEASUREMENTS = {"verifier": verifier.measure}

if __name__ == "__main__":
    json.dump({name: measure() for name, measure in MEASUREMENTS.items()}, sys.stdout, indent=2)
    sys.stdout.write("\n")
