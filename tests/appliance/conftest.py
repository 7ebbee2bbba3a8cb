"""The FL image for the virtual platform, built once for all tests that boot it."""

from __future__ import annotations

import os
import shutil
import socket
from contextlib import closing
from pathlib import Path

import pytest

from appliance.demo.setting import BOOTED_BROKER_PORT, BROKERS
from appliance.poc import BOOTED_PORTS
from cvm_image.build.errors import BuildFailed, MissingInput, UnusableHost
from cvm_image.build.image import build_image
from cvm_image.build.store import Store, default_cache
from cvm_image.signing import create_signing_keys

RECIPE = Path(__file__).resolve().parents[2] / "cvm_image/recipes/fl.toml"


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The FL image for the virtual platform."""
    if os.geteuid() != 0:
        pytest.skip("building an image needs root")
    if missing := [program for program in ("mmdebstrap", "bwrap") if shutil.which(program) is None]:
        pytest.skip(f"building an image needs {', '.join(missing)}: appliance/setup.sh mmdebstrap bubblewrap")
    for port in (*BOOTED_PORTS.values(), *range(BOOTED_BROKER_PORT, BOOTED_BROKER_PORT + len(BROKERS))):
        with closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                pytest.skip(f"port {port}, which the FL image's packet filter names, is used by another program")
    folder = tmp_path_factory.mktemp("fl")
    try:
        build_image(
            RECIPE,
            folder / "image",
            store=Store(default_cache()),
            keys=create_signing_keys(folder / "keys"),
            say=lambda line: None,
            variant="virtual",
        )
    except (MissingInput, BuildFailed, UnusableHost) as error:
        pytest.skip(f"the FL image's packages are not to be had: {error.what}")
    return folder / "image"
