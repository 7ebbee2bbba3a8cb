"""NVIDIA's attestation SDK in an image: an environment of its own, which runs under the guest's Python."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import pytest
from building import say

from attestation.attester.boot import GPU_PYTHON
from attestation.attester.gpu import COLLECTOR
from cvm_image.build.apt import find_archives
from cvm_image.build.errors import BuildFailed, MissingInput, UnusableHost
from cvm_image.build.gpu import SDK, SDK_PINS, add_environment, sdk_packages
from cvm_image.build.image import Build, make_tools, new_log, sdk_tree
from cvm_image.build.lock import LockedWheel, load_lock
from cvm_image.build.recipe import load_recipe
from cvm_image.build.store import Store, default_cache, digest_file
from cvm_image.build.tools import Mount
from cvm_image.build.workload import lay_out_wheels

RECIPE = Path(__file__).resolve().parents[3] / "cvm_image/recipes/fl-gpu.toml"
ASKING = """
import json, runpy, sys
import cryptography, lxml.etree, nv_attestation_sdk.gpu.attest_gpu_remote
collect = runpy.run_path("/build/collector.py")["collect"]
try:
    said = collect("00" * 32)
except LookupError as error:
    said = str(error)
print(json.dumps({"said": said, "path": sys.path, "cryptography": cryptography.__version__, "prefix": sys.prefix}))
"""


def test_the_environment_is_where_the_guest_looks_for_it(tmp_path: Path) -> None:
    wheel = tmp_path / "one-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("one/__init__.py", "")
    store = Store(tmp_path / "store")
    locked = LockedWheel(name="one", version="1", file=wheel.name, size=1, sha256=digest_file(wheel))
    wheel.rename(store.input(locked.sha256))
    lay_out_wheels([locked], store, tmp_path / "root", sdk_packages("3.13"))
    add_environment(tmp_path / "root", "3.13")
    assert (tmp_path / "root" / GPU_PYTHON).readlink() == Path("/usr/bin/python3.13")
    assert (tmp_path / "root" / SDK / "lib/python3.13/site-packages/one/__init__.py").is_file()
    assert "include-system-site-packages = false" in (tmp_path / "root" / SDK / "pyvenv.cfg").read_text()


def test_the_lock_holds_what_is_pinned() -> None:
    pins = {line.strip().lower() for line in SDK_PINS.read_text().splitlines() if line and not line.startswith("#")}
    lock = load_lock(RECIPE, "fl-gpu", "trixie")
    assert {f"{one.name}=={one.version}".lower() for one in lock.sdk} == pins


@pytest.mark.long
def test_the_sdk_runs_under_the_guest_s_python_and_finds_no_driver() -> None:
    if os.geteuid() != 0:
        pytest.skip("building an image needs root")
    recipe, store = load_recipe(RECIPE), Store(default_cache())
    log = new_log(store, "gpu-sdk")
    try:
        archives = find_archives(recipe.mirrors, recipe.keyring, log=log)
        build = Build(recipe, RECIPE, load_lock(RECIPE, recipe.name, recipe.suite), store, archives, log, say)
        tools = make_tools(build)
        tree = sdk_tree(build, tools)
    except (BuildFailed, MissingInput, UnusableHost) as error:
        pytest.skip(f"the locked packages are not to be had: {error.what}")
    mounts = (Mount(tree / SDK, "/build/sdk"), Mount(COLLECTOR, "/build/collector.py"))
    told = json.loads(tools.run(["/build/sdk/bin/python", "-I", "-c", ASKING], what="asking the SDK", mounts=mounts))
    assert told["said"].startswith("the NVIDIA driver does not answer")
    assert told["cryptography"] == "43.0.1"
    assert told["prefix"] == "/build/sdk"
    assert not any("dist-packages" in entry for entry in told["path"])
