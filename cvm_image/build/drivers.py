"""The drivers that a recipe compiles: compiler tree, modules from it, and what goes into the root beside them.

`seal image lock` compiles and signs them once (`lock_drivers`); each build compiles them again from the lock and must
come to the same bits (`signed_drivers`).
"""

from __future__ import annotations

import base64
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from cvm_image.build.apt import Apt, Archives, fetch_packages
from cvm_image.build.errors import BuildFailed
from cvm_image.build.gpu import COMPILER, COMPONENTS, GPUS, Gpu, put_into_root
from cvm_image.build.lock import Lock, LockedPackage
from cvm_image.build.modules import ModuleSource, compile_modules, put_signatures, sign_modules
from cvm_image.build.recipe import Recipe
from cvm_image.build.store import Store, content_key
from cvm_image.build.tools import Tools
from cvm_image.build.trees import extract_packages, lay_out_tree, settle

_IMAGE = re.compile(r"linux-image-(?P<release>\d[A-Za-z0-9.+~-]*)")


def kernel_release(lock: Lock) -> str:
    """The release of the locked kernel, as `uname -r` says it. Raises BuildFailed if the lock has no kernel."""
    for package in lock.kernel:
        found = _IMAGE.fullmatch(package.name)
        if found:
            return found["release"]
    raise BuildFailed("the lock names no kernel", where="lock", do="Renew it with `seal image lock`.")


def lock_drivers(
    recipe: Recipe, lock: Lock, archives: Archives, *, store: Store, tools: Callable[[Lock], Tools], log: Path
) -> Lock:
    """Return the lock with compiler, packages, signatures and certificate of the recipe's drivers.

    The key that signs is made here and is gone when this returns. `tools` gives the tools tree of a lock.
    """
    if recipe.gpu is None:
        return lock
    gpu = GPUS[recipe.gpu]
    apt = Apt(store.root / "apt" / f"{recipe.suite}-gpu", archives, recipe.suite, log=log, components=COMPONENTS)
    apt.update()
    compiler = apt.resolve(["?essential", *COMPILER, f"linux-headers-{kernel_release(lock)}"])
    driver = [one for name in (gpu.source, *gpu.packages) for one in apt.resolve_alone(name)]
    fetch_packages([*compiler, *driver], store, archives, folder=store.root / "apt" / "fetch", log=log)
    lock = lock.model_copy(update={"compiler": compiler, "driver": driver})
    modules = compile_drivers(gpu, lock, store, tools(lock), log)
    certificate, signed = sign_modules(modules, recipe.name)
    return lock.model_copy(update={"modules": signed, "certificate": certificate})


def compiler_key(lock: Lock) -> str:
    """The content key of the compiler's tree."""
    return content_key("compiler", rules=("trees",), packages=[one.sha256 for one in lock.compiler], epoch=lock.epoch)


def compiler_tree(lock: Lock, store: Store, tools: Tools, log: Path) -> Tools:
    """The tree of the lock's compiler, made if it is not in the cache; its packages are in the store."""
    key = compiler_key(lock)
    if store.made(key) is None:
        with store.making(key) as folder:
            tree = lay_out_tree(
                lock.compiler, store, suite=lock.suite, epoch=lock.epoch, folder=folder, log=log, tools=tools
            )
            settle(tree, remove=())
            (tree / "build").mkdir()
    tree_path = store.made(key)
    if tree_path is None:
        raise BuildFailed("the cache lost what was just put into it", where="cache", do="Build again.")
    return Tools(tree_path, log)


def compile_drivers(gpu: Gpu, lock: Lock, store: Store, tools: Tools, log: Path) -> dict[str, bytes]:
    """Compile the modules of a GPU for the locked kernel; name → bytes, unsigned."""
    compiler = compiler_tree(lock, store, tools, log)
    with tempfile.TemporaryDirectory(prefix="drivers-", dir=store.root) as name:
        work = Path(name)
        extract_packages([_package(lock, gpu.source)], store, work / "package", tools=tools)
        source = ModuleSource(work / "package" / gpu.archive, gpu.folder, gpu.modules, gpu.edits)
        (work / "source").mkdir()
        return compile_modules(compiler, source, work / "source", release=kernel_release(lock), epoch=lock.epoch)


def signed_drivers(recipe: Recipe, lock: Lock, store: Store, tools: Tools, log: Path) -> dict[str, bytes]:
    """The drivers of a recipe, compiled again and with the lock's signatures on; none for a recipe without.

    Raises BuildFailed if they do not come to the bits that were signed.
    """
    if recipe.gpu is None:
        return {}
    gpu = GPUS[recipe.gpu]
    certificate = certificate_of(lock)
    if certificate is None:
        raise BuildFailed("the lock has no signatures of drivers", where="lock", do="Renew it with `seal image lock`.")
    key = content_key(
        "drivers",
        rules=("modules", "gpu", "drivers"),
        compiler=compiler_key(lock),
        source=_package(lock, gpu.source).sha256,
        signed=[one.model_dump() for one in lock.modules],
        certificate=lock.certificate,
    )
    if store.made(key) is None:
        whole = put_signatures(compile_drivers(gpu, lock, store, tools, log), lock.modules, certificate)
        with store.making(key) as folder:
            (folder / "result").mkdir()
            for module, data in whole.items():
                (folder / "result" / module).write_bytes(data)
    made = store.made(key)
    if made is None:
        raise BuildFailed("the cache lost what was just put into it", where="cache", do="Build again.")
    return {module: (made / module).read_bytes() for module in gpu.modules}


def add_driver_files(recipe: Recipe, lock: Lock, store: Store, tools: Tools, root: Path) -> None:
    """Put firmware, libraries and daemon of the recipe's GPU into the root."""
    if recipe.gpu is None:
        return
    gpu = GPUS[recipe.gpu]
    with tempfile.TemporaryDirectory(prefix="drivers-", dir=store.root) as name:
        packages = [_package(lock, package) for package in gpu.packages]
        extract_packages(packages, store, Path(name) / "unpacked", tools=tools)
        put_into_root(gpu, Path(name) / "unpacked", root)


def certificate_of(lock: Lock) -> bytes | None:
    """The certificate (DER) of the key that signed the lock's modules, if there are any."""
    return None if lock.certificate is None else base64.b64decode(lock.certificate, validate=True)


def _package(lock: Lock, name: str) -> LockedPackage:
    found = [one for one in lock.driver if one.name == name]
    if len(found) != 1:
        raise BuildFailed(f"the lock has no package {name}", where="lock", do="Renew it with `seal image lock`.")
    return found[0]
