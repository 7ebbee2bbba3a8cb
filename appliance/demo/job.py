"""The data scientist's part: the recipe of `examples/breast_cancer`, its data, and what is done with the result."""

from __future__ import annotations

import importlib
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from appliance.demo.setting import SITES
from policies.errors import Unusable

if TYPE_CHECKING:
    from fl.recipes.recipe import Recipe

EXAMPLE: Final = Path(__file__).resolve().parents[2] / "examples/breast_cancer"


@contextmanager
def example() -> Iterator[Mapping[str, Any]]:
    """The example's modules by name, importable while the block runs. Raises Unusable outside of a checkout."""
    if not (EXAMPLE / "job.py").exists():
        raise Unusable("the demonstration's example is missing", where=str(EXAMPLE), do="Run it from a clone.")
    sys.path.insert(0, str(EXAMPLE))
    try:
        yield {name: importlib.import_module(name) for name in ("prepare", "job", "evaluate")}
    finally:
        sys.path.remove(str(EXAMPLE))


def split_patients() -> dict[str, bytes]:
    """Each site's own patients, by site. Nothing of it stays on disk."""
    with _split() as folder:
        return {site: (folder / member / "train.safetensors").read_bytes() for site, member in SITES.items()}


@contextmanager
def _split() -> Iterator[Path]:
    with example() as modules, tempfile.TemporaryDirectory() as folder:
        modules["prepare"].prepare(Path(folder))
        yield Path(folder)


def make_recipe() -> Recipe:
    """The recipe, six lines of Python in `examples/breast_cancer/job.py`."""
    with example() as modules:
        recipe: Recipe = modules["job"].make_recipe()
        return recipe


def evaluate(result: Path) -> dict[str, float]:
    """`accuracy` of the federated model on the owner's test set, and `pooled_accuracy` of training on pooled data.

    The pooled data exist nowhere in a federation; here the public data set is split anew for the comparison.
    """
    with example() as modules, _split() as data:
        job = modules["job"]
        measured: dict[str, float] = modules["evaluate"].report(result, data, epochs=job.ROUNDS * job.EPOCHS)
        return measured
