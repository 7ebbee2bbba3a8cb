"""Fuzz one reader of evidence: `python tests/fuzz/fuzz.py TARGET [libFuzzer's options] [corpus folder]`.

Without a corpus folder it starts from good evidence (the virtual platform's, the tests' own GPU vendor's), in a folder
that goes with the run. Bounds are libFuzzer's (`-max_total_time=60 -runs=10000000 -timeout=5`), and MEMORY_LIMIT.
Needs the `fuzz` extra (atheris).
"""

from __future__ import annotations

import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import atheris

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

with atheris.instrument_imports(include=["attestation", "fl", "gpu_targets", "snp_targets", "transport_targets"]):
    import gpu_targets
    import snp_targets
    import transport_targets

import gpu_seeds  # noqa: E402  (not instrumented: seeds are made, not tested)
import snp_seeds  # noqa: E402
import transport_seeds  # noqa: E402

TARGETS: Final = {**gpu_targets.TARGETS, **snp_targets.TARGETS, **transport_targets.TARGETS}
SEEDS: Final = {**gpu_seeds.SEEDS, **snp_seeds.SEEDS, **transport_seeds.SEEDS}
MEMORY_LIMIT: Final = 64 * 1024
"""KiB by which the process may grow over what it needs for good evidence, the fuzzer's own corpus included."""


def bounded(target: Callable[[bytes], None]) -> Callable[[bytes], None]:
    """`target`, which fails once the peak of this process's memory has grown by more than MEMORY_LIMIT."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + MEMORY_LIMIT

    def once(raw: bytes) -> None:
        target(raw)
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > most:
            raise MemoryError(f"more than {MEMORY_LIMIT} KiB over what good evidence needs")

    return once


def main() -> None:
    """Run one target until libFuzzer's bounds end it."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        raise SystemExit(f"a target is needed: {', '.join(TARGETS)}")
    # What breaks a target is kept under build/fuzz, unless the caller says where.
    found = HERE.parents[1] / "build" / "fuzz"
    found.mkdir(parents=True, exist_ok=True)
    options = [f"-artifact_prefix={found}/{name}-", *sys.argv[2:]]
    seeds = SEEDS[name]()
    for seed in seeds:
        TARGETS[name](seed)
    with tempfile.TemporaryDirectory(prefix="seal-fuzz-") as corpus:
        if all(option.startswith("-") for option in options):
            for number, seed in enumerate(seeds):
                (Path(corpus) / f"{number:03}").write_bytes(seed)
            options.append(corpus)
        atheris.Setup([sys.argv[0], *options], bounded(TARGETS[name]))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
