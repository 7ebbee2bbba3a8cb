"""From recipe and lock to an image folder: each part made once, kept by the digest of all that went into it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cvm_image.build import entry
from cvm_image.build.apt import Archives, fetch_packages, find_archives
from cvm_image.build.bill import bill_of_materials
from cvm_image.build.container import CONTAINER, take_container, unpack_container
from cvm_image.build.disk import Root, join_layers, make_layer
from cvm_image.build.drivers import add_driver_files, certificate_of, signed_drivers
from cvm_image.build.errors import BuildFailed, UnusableRecipe
from cvm_image.build.gpu import GPUS, add_environment, sdk_packages
from cvm_image.build.initrd import ROOT_MODULES, LoadableModule, make_initrd, module_name, modules_folder, pick_modules
from cvm_image.build.lock import Lock, LockedPackage, LockedWheel, Purpose, load_lock
from cvm_image.build.netfilter import RULES_FILE, packet_filter
from cvm_image.build.provenance import read_source
from cvm_image.build.recipe import Recipe, load_recipe
from cvm_image.build.signed import sign_image
from cvm_image.build.store import Store, content_key, folder_digest
from cvm_image.build.tools import Mount, Tools
from cvm_image.build.trees import extract_packages, lay_out_tree, settle
from cvm_image.build.wheels import fetch_wheels
from cvm_image.build.workload import GUEST, OURS, WHEELS, File, collect, compile_python, lay_out_wheels, write_tree
from cvm_image.manifest import ImageManifest
from cvm_image.signing import SigningKeys

PROJECT = Path(__file__).resolve().parents[2]
"""The folder that holds our packages, from which the workload layer takes them."""

ARGUMENTS = (
    "console=ttyS0",
    "lockdown=integrity",
    "module.sig_enforce=1",
    "random.trust_cpu=1",
    "random.trust_bootloader=0",
    "init_on_alloc=1",
    "slab_nomerge",
    "vsyscall=none",
    "debugfs=off",
    "ia32_emulation=0",
    "panic=-1",
    "oops=panic",
    "loglevel=5",
    *entry.ARGUMENTS,
)
"""Every image's command line begins with these: no unsigned module, no way to change the running kernel, the random
pool seeded from the processor and never from the host's seed, an end instead of an unsure state, and no windows from
ACPI, whose AML is ours."""

MEASURED = ("kernel", "initrd", "cmdline", "firmware.fd")
PARTS = (*MEASURED, "rootfs.erofs", "rootfs.verity")


@dataclass(frozen=True)
class Build:
    """One run of the build: what is made, from what, and where its words go."""

    recipe: Recipe
    recipe_path: Path
    lock: Lock
    store: Store
    archives: Archives | None
    log: Path
    say: Callable[[str], None]


def build_image(
    recipe_path: Path,
    output: Path,
    *,
    store: Store,
    keys: SigningKeys,
    say: Callable[[str], None],
    variant: str | None = None,
    offline: bool = False,
) -> ImageManifest:
    """Build the image of the recipe at `recipe_path` into the folder `output`, which is replaced as a whole.

    Offline, only the cache is used. The same recipe, lock, sources and keys give the same bytes. Raises what the
    modules of the build raise; `output` is then as it was.
    """
    _check_output(output)
    recipe = load_recipe(recipe_path, variant=variant)
    lock = load_lock(recipe_path, recipe.name, recipe.suite)
    log = new_log(store, recipe.name)
    source = read_source(recipe, recipe_path)
    archives = None if offline else find_archives(recipe.mirrors, recipe.keyring, log=log)
    build = Build(recipe, recipe_path, lock, store, archives, log, say)
    output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        folder.chmod(0o755)
        with store.alone(say):
            root = make_parts(build, folder)
        manifest = sign_image(folder, recipe, source, lock, root, keys)
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def new_log(store: Store, name: str) -> Path:
    """A log file of its own for this process."""
    return store.logs / f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{name}-{os.getpid()}.log"


def make_parts(build: Build, folder: Path) -> Root:
    """Write kernel, initrd, command line, firmware, root, verity tree and bill of materials into `folder`."""
    tools = make_tools(build)
    shutil.copyfile(_firmware(build, tools), folder / "firmware.fd")
    kernel = _kernel(build, tools)
    (folder / "kernel").write_bytes(
        entry.wrap_kernel(entry.program(), _kernel_file(kernel).read_bytes(), certificate_of(build.lock))
    )
    shutil.copyfile(_initrd(build, tools, kernel), folder / "initrd")
    base = _base_layer(build, tools)
    files = collect(build.recipe, build.recipe_path)
    files[RULES_FILE] = File(packet_filter(build.recipe.network).encode())
    workload = _workload_layer(build, tools, files)
    with _step(build, "root file system and its verity tree"):
        root = join_layers(tools, base, workload, folder)
    (folder / "cmdline").write_text(command_line(build.recipe, root))
    (folder / "sbom.cdx.json").write_bytes(bill_of_materials(build.lock, files, version=metadata.version("sealwright")))
    for name in PARTS:
        (folder / name).chmod(0o644)
    return root


def command_line(recipe: Recipe, root: Root) -> str:
    """The kernel's command line, which is measured: what every image has, the recipe's own words, root and init."""
    for word in recipe.kernel.arguments:
        name = word.partition("=")[0]
        if (
            name.startswith("sealwright.")
            or name in {"init", "rdinit", "root", "roothash"}
            or name in {one.partition("=")[0] for one in ARGUMENTS}
        ):
            raise UnusableRecipe(
                f"the recipe may not set {name}", where="kernel.arguments", do="Leave it to the build."
            )
    entry = () if recipe.entry is None else (f"sealwright.entry={recipe.entry}",)
    return " ".join((*ARGUMENTS, *recipe.kernel.arguments, *entry, root.argument(), f"init={recipe.init}"))


def make_tools(build: Build) -> Tools:
    """The tools tree of the lock, made if it is not in the cache."""
    key = _tools_key(build)
    tree = build.store.made(key)
    if tree is None:
        packages = _fetched(build, "tools")
        with _step(build, f"tools tree ({len(packages)} packages)"), build.store.making(key) as folder:
            made = lay_out_tree(
                packages,
                build.store,
                suite=build.lock.suite,
                epoch=build.lock.epoch,
                folder=folder,
                log=build.log,
                tools=None,
            )
            settle(made, remove=())
            (made / "build").mkdir()  # where Tools mounts what a command works on
        tree = build.store.made(key)
    return Tools(_present(tree), build.log)


def _tools_key(build: Build) -> str:
    return content_key(
        "tools", rules=("tools", "trees"), packages=[one.sha256 for one in build.lock.tools], epoch=build.lock.epoch
    )


def _firmware(build: Build, tools: Tools) -> Path:
    wanted = build.recipe.firmware.file
    key = content_key("firmware", rules=(), packages=[one.sha256 for one in build.lock.firmware], file=wanted)
    made = build.store.made(key)
    if made is None:
        packages = _fetched(build, "firmware")
        with _step(build, "firmware"), build.store.making(key) as folder:
            extract_packages(packages, build.store, folder / "unpacked", tools=tools)
            file = folder / "unpacked" / wanted
            if not file.is_file():
                raise UnusableRecipe(f"the package holds no {wanted}", where="firmware.file", do="Correct the recipe.")
            file.rename(folder / "result")
        made = build.store.made(key)
    return _present(made)


def _kernel_key(build: Build) -> str:
    return content_key("kernel", rules=(), packages=[one.sha256 for one in build.lock.kernel], tools=_tools_key(build))


def _kernel(build: Build, tools: Tools) -> Path:
    key = _kernel_key(build)
    made = build.store.made(key)
    if made is None:
        packages = _fetched(build, "kernel")
        with _step(build, "kernel"), build.store.making(key) as folder:
            extract_packages(packages, build.store, folder / "result", tools=tools)
            modules = modules_folder(folder / "result")
            base = modules.parents[2]
            tools.run(
                ["depmod", "-b", "/build/base", modules.name],
                what="indexing the kernel's modules",
                mounts=(Mount(base, "/build/base", writable=True),),
                timeout=300,
            )
        made = build.store.made(key)
    return _present(made)


def _kernel_file(kernel: Path) -> Path:
    found = list((kernel / "boot").glob("vmlinuz-*"))
    if len(found) != 1:
        raise BuildFailed(
            f"the kernel package holds {len(found)} kernels", where=str(kernel), do="Name another package."
        )
    return found[0]


def _drivers(build: Build, tools: Tools) -> dict[str, bytes]:
    if build.recipe.gpu is None:
        return {}
    for purpose in ("compiler", "driver"):
        _fetched(build, purpose)
    with _step(build, "drivers"):
        return signed_drivers(build.recipe, build.lock, build.store, tools, build.log)


def _initrd(build: Build, tools: Tools, kernel: Path) -> Path:
    gpu = () if build.recipe.gpu is None else GPUS[build.recipe.gpu].before
    wanted = (*ROOT_MODULES, *build.recipe.modules(), *gpu)
    optional = build.recipe.kernel.hardware_modules
    drivers = _drivers(build, tools)
    script = (Path(__file__).parent / "guest" / "initrd-init").read_bytes()
    key = content_key(
        "initrd",
        rules=("initrd",),
        kernel=_kernel_key(build),
        tools=_tools_key(build),
        modules=list(wanted),
        optional=list(optional),
        drivers={name: hashlib.sha256(data).hexdigest() for name, data in drivers.items()},
        script=hashlib.sha256(script).hexdigest(),
    )
    made = build.store.made(key)
    if made is None:
        with _step(build, "initrd"), build.store.making(key) as folder:
            picked = pick_modules(kernel, wanted, optional)
            picked += [LoadableModule(module_name(name), data, optional=True) for name, data in drivers.items()]
            (folder / "result").write_bytes(make_initrd(tools, picked))
        made = build.store.made(key)
    return _present(made)


def _base_key(build: Build) -> str:
    return content_key(
        "base",
        rules=("trees", "disk", "gpu"),
        packages=[one.sha256 for one in build.lock.base],
        remove=list(build.recipe.base.remove),
        programs=list(build.recipe.base.programs),
        gpu=None if build.recipe.gpu is None else [build.recipe.gpu, *(one.sha256 for one in build.lock.driver)],
        suite=build.lock.suite,
        epoch=build.lock.epoch,
        tools=_tools_key(build),
    )


def _base_layer(build: Build, tools: Tools) -> Path:
    key = _base_key(build)
    layer = build.store.made(f"{key}.erofs")
    if layer is None:
        packages = _fetched(build, "base")
        with _step(build, f"base layer ({len(packages)} packages)"), build.store.making(f"{key}.erofs") as folder:
            tree = lay_out_tree(
                packages,
                build.store,
                suite=build.lock.suite,
                epoch=build.lock.epoch,
                folder=folder,
                log=build.log,
                tools=tools,
            )
            settle(tree, remove=build.recipe.base.remove, programs=build.recipe.base.programs)
            add_driver_files(build.recipe, build.lock, build.store, tools, tree)
            tree.rename(folder / "tree")
            make_layer(tools, folder / "tree", folder / "result", name="base", epoch=build.lock.epoch, all_root=False)
        layer = build.store.made(f"{key}.erofs")
    return _present(layer)


def _workload_layer(build: Build, tools: Tools, files: dict[str, File]) -> Path:
    key = content_key(
        "workload",
        rules=("workload", "disk", "container", "gpu"),
        files=folder_digest({f"{name}{'*' if file.executable else ''}": file.data for name, file in files.items()}),
        wheels=[one.sha256 for one in (*build.lock.wheels, *build.lock.sdk)],
        container=[one.sha256 for one in build.lock.containers],
        epoch=build.lock.epoch,
        tools=_tools_key(build),
    )
    layer = build.store.made(key)
    if layer is None:
        trees = [_wheels_tree(build, tools, build.lock.wheels, WHEELS)]
        if build.lock.sdk:
            trees.append(sdk_tree(build, tools))
        with _step(build, f"workload layer ({len(files)} files)"), build.store.making(key) as folder:
            for tree in trees:
                shutil.copytree(tree, folder / "tree", symlinks=True, copy_function=os.link, dirs_exist_ok=True)
            write_tree(files, folder / "tree")
            compile_python(tools, folder / "tree", (OURS, GUEST))
            for container in build.lock.containers:
                unpack_container(take_container(container, build.recipe_path, build.store), folder / "tree" / CONTAINER)
            make_layer(
                tools, folder / "tree", folder / "result", name="workload", epoch=build.lock.epoch, all_root=True
            )
        layer = build.store.made(key)
    return _present(layer)


def _wheels_tree(build: Build, tools: Tools, wheels: list[LockedWheel], place: str, python: str | None = None) -> Path:
    """Wheels' files below `place`, compiled: apart from our own packages, which change more often.

    With `python` it is an environment of its own (`cvm_image.build.gpu`), and its packages lie in there.
    """
    key = content_key(
        "wheels",
        rules=("workload", "gpu"),
        wheels=[one.sha256 for one in wheels],
        place=place,
        python=python,
        tools=_tools_key(build),
    )
    made = build.store.made(key)
    if made is None:
        fetch_wheels(wheels, build.store, online=build.archives is not None, log=build.log)
        with _step(build, f"wheels ({len(wheels)})"), build.store.making(key) as folder:
            lay_out_wheels(wheels, build.store, folder / "result", place)
            compile_python(tools, folder / "result", (place,))
            if python is not None:
                add_environment(folder / "result", python)
        made = build.store.made(key)
    return _present(made)


def sdk_tree(build: Build, tools: Tools) -> Path:
    """The environment of the GPU maker's attestation SDK, apart from all other packages: it pins old ones."""
    python = build.recipe.python or "3.13"
    return _wheels_tree(build, tools, build.lock.sdk, sdk_packages(python), python)


def _fetched(build: Build, purpose: Purpose) -> list[LockedPackage]:
    packages = build.lock.packages(purpose)
    fetch_packages(packages, build.store, build.archives, folder=build.store.root / "apt" / "fetch", log=build.log)
    return packages


def _check_output(output: Path) -> None:
    if not output.exists():
        return
    if not output.is_dir() or (any(output.iterdir()) and not (output / "cmdline").is_file()):
        raise UnusableRecipe(
            "the output folder holds something else than an image", where=str(output), do="Name a new folder."
        )


def _present(path: Path | None) -> Path:
    if path is None:
        raise BuildFailed("the cache lost what was just put into it", where="cache", do="Build again.")
    return path


@contextlib.contextmanager
def _step(build: Build, what: str) -> Iterator[None]:
    """Say what is being made, and how long it took."""
    start = time.monotonic()
    build.say(f"{what} …")
    yield
    build.say(f"{what}: done after {time.monotonic() - start:.1f} s")
