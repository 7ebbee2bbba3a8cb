"""`seal image lock`: ask the archives, as they are today and as their keys sign them, what the recipe's names mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cvm_image.build.apt import Apt, Archives, fetch_packages, find_archives
from cvm_image.build.container import lock_container
from cvm_image.build.drivers import lock_drivers
from cvm_image.build.errors import UnusableRecipe
from cvm_image.build.gpu import SDK_PINS
from cvm_image.build.image import PROJECT, Build, make_tools, new_log
from cvm_image.build.lock import Lock, lock_path, write_lock
from cvm_image.build.provenance import read_source
from cvm_image.build.recipe import load_recipe
from cvm_image.build.store import Store
from cvm_image.build.tools import PACKAGES, Tools
from cvm_image.build.wheels import lock_pinned, lock_wheels

_PROVIDED = {"python3-torch": ("torch", "numpy"), "python3-numpy": ("numpy",)}
"""Debian packages that stand in for wheels."""


def lock_recipe(recipe_path: Path, *, store: Store, say: Callable[[str], None]) -> Lock:
    """Resolve every input of the recipe, fetch it, write the lock beside the recipe, and return it.

    Times are not the clock's: the lock's epoch is the date of the newest release file of the suite.
    """
    with store.alone(say):
        return _lock_recipe(recipe_path, store=store, say=say)


def archive_inputs(recipe_path: Path, lock: Lock, *, store: Store, archive: Path) -> int:
    """Keep every input of the recipe by digest in `archive`, recipe and lock included; return how many there are."""
    source = read_source(load_recipe(recipe_path), recipe_path)
    return store.export_inputs(lock.digests(), archive, more=source.inputs(lock))


def _lock_recipe(recipe_path: Path, *, store: Store, say: Callable[[str], None]) -> Lock:
    recipe = load_recipe(recipe_path)
    log = new_log(store, f"{recipe.name}-lock")
    archives = find_archives(recipe.mirrors, recipe.keyring, log=log)
    say(f"asking {len(archives.urls)} archives for {recipe.suite}")
    apt = Apt(store.root / "apt" / recipe.suite, archives, recipe.suite, log=log)
    epoch = apt.update()
    tools = apt.resolve(["?essential", *PACKAGES])
    kernel = apt.resolve_alone(apt.dependency(recipe.kernel.package, r"linux-image-\d.*"))
    base = apt.resolve(["?essential", *recipe.base.packages])
    firmware = recipe.firmware
    say(f"asking for {firmware.package} of {firmware.suite}")
    only_main = Archives({"debian": archives.urls["debian"]}, archives.keyring)
    other = Apt(store.root / "apt" / firmware.suite, only_main, firmware.suite, log=log)
    other.update()
    blob = other.resolve_alone(firmware.package)
    if not (kernel and blob):
        raise UnusableRecipe(
            "an archive has no kernel or no firmware of that name", where=str(recipe_path), do="Correct it."
        )
    provided = [name for package in recipe.base.packages for name in _PROVIDED.get(package, ())]
    wheels = lock_wheels(
        recipe.workload.wheels,
        python=recipe.python or "3.13",
        constraints=PROJECT / "constraints.txt",
        provided=provided,
        store=store,
        log=log,
    )
    python = recipe.python or "3.13"
    sdk = [] if recipe.gpu is None else lock_pinned(SDK_PINS, python=python, store=store, log=log)
    container = recipe.workload.container
    lock = Lock(
        recipe=recipe.name,
        suite=recipe.suite,
        epoch=epoch,
        tools=tools,
        firmware=blob,
        kernel=kernel,
        base=base,
        wheels=wheels,
        sdk=sdk,
        containers=[] if container is None else [lock_container(container, recipe_path, store)],
    )
    if recipe.gpu is not None:
        say(f"compiling and signing drivers for {recipe.gpu}")

    def tools_of(now: Lock) -> Tools:
        fetch_packages(now.tools, store, archives, folder=store.root / "apt" / "fetch", log=log)
        return make_tools(Build(recipe, recipe_path, now, store, archives, log, say))

    lock = lock_drivers(recipe, lock, archives, store=store, tools=tools_of, log=log)
    target = lock_path(recipe_path)
    partial = target.with_suffix(".partial")
    partial.write_text(write_lock(lock))
    partial.replace(target)
    everything = [*tools, *blob, *kernel, *base]
    fetch_packages(everything, store, archives, folder=store.root / "apt" / "fetch", log=log)
    say(f"{len(tools)} packages for the tools, {len(base)} for the base, {len(wheels)} wheels, in {target}")
    return lock
