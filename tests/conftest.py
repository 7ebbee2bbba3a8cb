"""What tests of several packages share: one virtual vendor with a chip of each product, made once for a whole run."""

from __future__ import annotations

import fcntl
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import settings
from virtual_guests import World

from attestation.evidence.report import Product
from attestation.virtual.chip import Chip, create_chip, load_chip
from attestation.virtual.vendor import Vendor, create_vendor

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that all workers of one test run share, and no other run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def virtual_vendor(shared_folder: Path) -> Vendor:
    """A virtual vendor with the roots of all products; `virtual_vendor.folder` is its folder."""
    with (shared_folder / "vendor.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return create_vendor(shared_folder / "vendor")


@pytest.fixture(scope="session")
def virtual_chips(virtual_vendor: Vendor, shared_folder: Path) -> Mapping[Product, Chip]:
    """A chip of each product, certified by `virtual_vendor`; their folders are `shared_folder/chip-Milan` and so on."""
    chips: dict[Product, Chip] = {}
    with (shared_folder / "vendor.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for product in Product:
            folder = shared_folder / f"chip-{product.value}"
            chips[product] = load_chip(folder) if folder.exists() else create_chip(virtual_vendor, folder, product)
    return chips


def pytest_configure() -> None:
    """A run in the background of a shell ignores SIGINT, and so would every program that a test interrupts."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slice", metavar="K/N", default="0/1", help="run the K-th (from 0) of N slices of the tests")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep one slice of the files that have long tests, the same for a given set of tests in every worker."""
    wanted, _, slices = config.getoption("--slice").partition("/")
    if not (wanted.isdecimal() and slices.isdecimal() and int(wanted) < int(slices)):
        raise pytest.UsageError("--slice takes K/N with K below N, such as 1/3")
    if int(slices) == 1:
        return
    # by files, since what a file sets up serves all its tests
    files = sorted({item.path for item in items if item.get_closest_marker("long")})
    kept = set(files[int(wanted) :: int(slices)])
    config.hook.pytest_deselected(items=[item for item in items if item.path not in kept])
    items[:] = [item for item in items if item.path in kept]


@pytest.fixture(scope="session")
def virtual_world(virtual_chips: Mapping[Product, Chip], shared_folder: Path) -> World:
    """The folders of the virtual vendor and of a Milan chip, as the platform process takes them."""
    return World(vendor=shared_folder / "vendor", chip=shared_folder / "chip-Milan")
