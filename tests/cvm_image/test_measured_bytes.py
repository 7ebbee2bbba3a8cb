"""Measured bytes are the bytes run: a swap on disk after the measurement changes neither."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from pathlib import Path

import pytest
from virtual_guests import make_image

from attestation.virtual.launch import LaunchSettings, launch, read_init_data, read_measured, unpack_guest

OTHER = "def main(guest):\n    return 1  # stolen\n"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("measured")
    make_image(folder / "genuine")
    make_image(folder / "hostile", OTHER)
    return folder / "genuine", folder / "hostile"


def test_a_swap_between_measuring_and_unpacking_changes_nothing(images: tuple[Path, Path], tmp_path: Path) -> None:
    genuine, hostile = images
    image = Path(shutil.copytree(genuine, tmp_path / "image"))
    files = read_measured(image)
    for name in ("firmware.fd", "kernel", "initrd", "cmdline", "id-block", "id-auth"):
        shutil.copyfile(hostile / name, image / name)
    context = launch(files, LaunchSettings(), b"", bytes(32))
    unpack_guest(files, tmp_path / "guest")
    expected = launch(read_measured(genuine), LaunchSettings(), b"", bytes(32))
    assert context.measurement == expected.measurement
    assert b"stolen" not in (tmp_path / "guest/lib/probe/entry.py").read_bytes()


def test_each_measured_file_is_opened_once(images: tuple[Path, Path], tmp_path: Path) -> None:
    """A host that answers each opening differently (here: a pipe, which can be read once) finds one opening only."""
    genuine, _ = images
    image = Path(shutil.copytree(genuine, tmp_path / "image"))
    for name in ("firmware.fd", "kernel", "initrd", "cmdline"):
        (image / name).unlink()
        os.mkfifo(image / name)
    feeder = threading.Thread(target=feed, args=(genuine, image))
    feeder.start()
    files = read_measured(image)
    feeder.join(5)
    context = launch(files, LaunchSettings(), b"", bytes(32))
    unpack_guest(files, tmp_path / "guest")
    assert context.measurement == launch(read_measured(genuine), LaunchSettings(), b"", bytes(32)).measurement


def feed(source: Path, target: Path) -> None:
    """Write each measured file once into the pipe that stands in its place, in the order in which they are read."""
    for name in ("firmware.fd", "kernel", "initrd", "cmdline"):
        with (target / name).open("wb") as pipe:
            pipe.write((source / name).read_bytes())


def test_init_data_are_bound_as_they_were_read(images: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "init-data.toml"
    path.write_bytes(b"genuine")
    raw = read_init_data(path)
    path.write_bytes(b"hostile")
    context = launch(read_measured(images[0]), LaunchSettings(), raw, bytes(32))
    assert context.host_data == hashlib.sha256(b"genuine").digest()
