"""Run every fuzz target for a while, one after the other: `python tests/fuzz/run.py [--seconds N] [TARGET...]`.

Ends with status 1 if a target broke; what broke it is under build/fuzz. Bounds: N seconds (20) or RUNS inputs for each
target, 5 seconds for one input, and 64 MiB of memory over what good evidence needs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

import gpu_targets  # noqa: E402  (its folder is found by the line above)
import snp_targets  # noqa: E402
import transport_targets  # noqa: E402

TARGETS = [*snp_targets.TARGETS, *gpu_targets.TARGETS, *transport_targets.TARGETS]
RUNS = 10_000_000


def main() -> int:
    """Fuzz the targets that were named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - set(TARGETS)
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}")
    broken = [name for name in arguments.targets or TARGETS if not hold(name, arguments.seconds)]
    if broken:
        sys.stdout.write(f"broken: {', '.join(broken)}; the inputs are in build/fuzz\n")
    return 1 if broken else 0


def hold(name: str, seconds: int) -> bool:
    """Whether a target holds for so long; says how many inputs it saw, or how it broke."""
    bounds = [f"-max_total_time={seconds}", f"-runs={RUNS}", "-timeout=5", "-malloc_limit_mb=64"]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "fuzz.py"), name, *bounds],
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONPATH": ""},
        timeout=seconds + 120,
        check=False,
    )
    last = [line for line in done.stderr.splitlines() if line.startswith("Done ")]
    if done.returncode == 0 and last:
        sys.stdout.write(f"{name:<24} holds: {last[-1].removeprefix('Done ')}\n")
        sys.stdout.flush()
        return True
    sys.stdout.write(f"{name:<24} BROKEN\n{done.stderr[-3000:]}\n")
    return False


if __name__ == "__main__":
    sys.exit(main())
