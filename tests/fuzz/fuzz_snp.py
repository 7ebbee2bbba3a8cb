"""Fuzz the readers of SEV-SNP evidence: `python tests/fuzz/fuzz_snp.py TARGET [libFuzzer's options] [corpus folder]`.

Without a corpus folder it starts from the virtual platform's good evidence, in a folder that goes with the run.
Bounds are libFuzzer's: `-max_total_time=60 -rss_limit_mb=2048 -timeout=5`. Needs the `fuzz` extra (atheris).
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import atheris

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

with atheris.instrument_imports(include=["attestation", "snp_targets"]):
    from snp_targets import TARGETS


def main() -> None:
    """Run one target until libFuzzer's bounds end it."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in TARGETS:
        raise SystemExit(f"a target is needed: {', '.join(TARGETS)}")
    # What breaks a target is kept under build/fuzz, unless the caller says where.
    found = HERE.parents[1] / "build" / "fuzz"
    found.mkdir(parents=True, exist_ok=True)
    options = [f"-artifact_prefix={found}/{name}-", *sys.argv[2:]]
    with tempfile.TemporaryDirectory(prefix="seal-fuzz-") as corpus:
        if all(option.startswith("-") for option in options):
            from snp_seeds import SEEDS

            for number, seed in enumerate(SEEDS[name]()):
                (Path(corpus) / f"{number:03}").write_bytes(seed)
            options.append(corpus)
        atheris.Setup([sys.argv[0], *options], TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main()
