"""What every recipe is: settings, a first model and a folder of code, to be executed in an environment."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, Required, TypeAlias, TypedDict

from pydantic import ValidationError

from fl.errors import RecipeUnusable
from fl.jobs.large_files import LARGE, LargeFile, on_disk
from fl.jobs.settings import JobSettings, TensorSettings
from fl.model import Framework, tensors_of
from fl.recipes.checkpoints import load_checkpoint, with_numbers
from fl.tensors import Buffer, TensorSpec
from fl.transport.memory import SealedMemory

if TYPE_CHECKING:
    import torch

    from fl.jobs.bundle import Bundle
    from fl.run import Run

InitialModel: TypeAlias = "torch.nn.Module | Mapping[str, Any]"
"""A torch module, `{"class_path": ..., "args": {...}}` for one, or arrays or tensors by name."""

MoreTensors: TypeAlias = Callable[
    [InitialModel, Mapping[str, tuple[TensorSpec, Buffer]]], Mapping[str, tuple[TensorSpec, Buffer]]
]
"""From a model and its tensors, what else travels with them (control variates)."""

EXPORT_VARIABLE: Final = "SEAL_EXPORT_BUNDLE"
"""With this environment variable set, `execute` writes the job's bundle and first model there instead of running it."""
FILES_FOLDER: Final = "files"
"""Where an exported job has its large files, each under its digest."""
EXPORT_FOLDER: Final = "exported-job"
"""Where `--export` writes them without `--export-dir`."""


def take_export_flag(argv: list[str]) -> Path | None:
    """Take `--export` and `--export-dir DIR` out of a command line; the folder, or None without `--export`.

    A command line that is wrong about them stays as it is: the script's own parser tells.
    """
    left: list[str] = []
    folder, asked = EXPORT_FOLDER, False
    words = iter(argv)
    for word in words:
        if word == "--export":
            asked = True
        elif word == "--export-dir":
            following = next(words, None)
            if following is None:
                return None
            folder = following
        elif word.startswith("--export-dir="):
            folder = word.partition("=")[2]
        else:
            left.append(word)
    argv[:] = left
    return Path(folder) if asked else None


# At import, before the author's own argument parser sees the words: any script that executes a recipe has this option.
_EXPORT_TO: Final = take_export_flag(sys.argv)


class Environment(Protocol):
    """Where a recipe runs."""

    def execute(self, recipe: Recipe) -> Run:
        """Start the recipe's job and return its run."""


class Recipe:
    """A job that can be executed anywhere: what it asks for (`settings`), its code (`folder`), its first model."""

    def __init__(self, settings: JobSettings, folder: Path, tensors: Mapping[str, tuple[TensorSpec, Buffer]]) -> None:
        self.settings = settings
        self.folder = folder
        self.added: dict[str, bytes] = {}
        """Files of the job that are not in its folder, by their path in the bundle."""
        self.large: dict[str, Path] = {}
        """Files of the job that are too large for its bundle, by digest."""
        self._tensors = tensors

    @property
    def name(self) -> str:
        """The job's name."""
        return self.settings.name

    def first_model(self) -> SealedMemory:
        """The first global model, as one safetensors file in sealed memory, the caller's to close."""
        return SealedMemory.of_tensors(self._tensors)

    def execute(self, env: Environment) -> Run:
        """Run the job in `env`. SimEnv returns when it has ended, ProdEnv when it is submitted."""
        target = os.environ.get(EXPORT_VARIABLE)
        if target:
            self.export(target)
            raise SystemExit(0)
        if _EXPORT_TO is not None:
            digest = self.export(_EXPORT_TO)
            sys.stdout.write(f"{_EXPORT_TO / 'job.bundle'}: {digest}\n")
            raise SystemExit(0)
        return env.execute(self)

    def bundle(self) -> Bundle:
        """The job's bundle: its folder, its added files and its settings."""
        from fl.jobs.bundle import make_bundle

        return make_bundle(self.folder, self.settings, self.added)

    def add_file(self, path: str | Path) -> None:
        """Add a file, or every file of a folder, to the bundle: beside the script, under its own name.

        Server and sites have one bundle, so every site gets it. What has more than 16 MiB is not in the bundle itself,
        which names its digest, and may be as large as memory (`fl.jobs.large_files`). Raises RecipeUnusable.
        """
        source = Path(path)
        source = (
            source
            if source.is_absolute()
            else next((folder / source for folder in (self.folder, Path.cwd()) if (folder / source).exists()), source)
        )
        if source.is_dir():
            found = {f"{source.name}/{one.relative_to(source).as_posix()}": one for one in sorted(source.rglob("*"))}
            files = {name: one for name, one in found.items() if one.is_file() and "__pycache__" not in one.parts}
        elif source.is_file():
            files = {source.name: source}
        else:
            raise RecipeUnusable(f"there is no file {path}", where="add_file")
        for name, one in files.items():
            if one.stat().st_size > LARGE:
                self._add_large(name, one)
                continue
            data = one.read_bytes()
            there = self.folder / name
            if there.is_file() and there.read_bytes() != data:
                raise RecipeUnusable(f"the recipe's folder has another file {name}", where="add_file")
            self.added[name] = data

    def _add_large(self, name: str, source: Path) -> None:
        there = self.folder / name
        if name in self.added or (there.exists() and not there.samefile(source)):
            raise RecipeUnusable(f"the recipe has another file {name}", where="add_file")
        file = on_disk(source.resolve())
        entry = LargeFile(path=name, sha256=file.digest, size=file.size)
        others = (other for other in self.settings.files if other.path != name)
        self.change(files=[one.model_dump() for one in sorted((*others, entry), key=lambda one: one.path)])
        self.large[entry.sha256] = file.path

    def add_client_file(self, file_path: str | Path) -> None:
        """`add_file`, by FLARE's name."""
        self.add_file(file_path)

    def add_server_file(self, file_path: str | Path) -> None:
        """`add_file`, by FLARE's name."""
        self.add_file(file_path)

    def add_client_input_filter(self, function: str | Callable[..., Any]) -> None:
        """Have the client API apply a function, FLModel to FLModel, to each model before the script receives it.

        `function` is `"module:name"` or the function itself, in a module of the recipe's folder. It runs in the
        script's own process: what must hold whatever a script does belongs into the declared outputs, not here.
        """
        self._add_filter("receive", function)

    def add_client_output_filter(self, function: str | Callable[..., Any]) -> None:
        """Have the client API apply a function, FLModel to FLModel, to each answer that the script sends."""
        self._add_filter("send", function)

    def _add_filter(self, way: str, function: str | Callable[..., Any]) -> None:
        name = function if isinstance(function, str) else _importable(function)
        now = self.settings.filters.model_dump()
        self.change(filters={**now, way: (*now[way], name)})

    def set_per_site_config(self, config: Mapping[str, Mapping[str, Any]]) -> None:
        """What sites do otherwise than the others: `{"site-1": {"train_script": ..., "train_args": ...}}`.

        Raises RecipeUnusable.
        """
        self.change(sites=_site_settings(config))

    def change(self, **settings: Any) -> None:
        """Change settings, checked as all are. Raises RecipeUnusable."""
        self.settings = _checked_settings({**self.settings.model_dump(), **settings})

    def export(self, folder: str | Path) -> str:
        """Write `job.bundle`, `model.safetensors` and large files (`files/DIGEST`) there; the bundle's digest."""
        folder = Path(folder)
        bundle = self.bundle()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "job.bundle").write_bytes(bundle.raw)
        with self.first_model() as model:
            (folder / "model.safetensors").write_bytes(model.view)
        for digest, source in self.large.items():
            (folder / FILES_FOLDER).mkdir(mode=0o700, exist_ok=True)
            shutil.copyfile(source, folder / FILES_FOLDER / digest)
        return bundle.digest


class TrainingArguments(TypedDict, total=False):
    """The arguments that every recipe of rounds of training shares; docs/reference/recipes.md has each."""

    name: str
    initial_model: InitialModel | None
    model: InitialModel | None
    initial_ckpt: str | Path | None
    per_site_config: Mapping[str, Mapping[str, Any]] | None
    key_metric: str | None
    key_metric_mode: Literal["max", "min"] | None
    stop_cond: str | None
    patience: int | None
    aggregator: str | None
    secure_aggregation: bool | Mapping[str, Any]
    robust: Mapping[str, Any] | None
    watermark: bool | Mapping[str, Any]
    min_clients: Required[int]
    num_rounds: int
    train_script: Required[str]
    train_args: str | Sequence[str]
    params_type: Literal["FULL", "DIFF"]
    delta: Literal["bf16", "int8"] | None
    round_seconds: int


class TrainingRecipe(Recipe):
    """A recipe of rounds of training: the arguments that all share, and the options of one."""

    def __init__(
        self,
        recipe: str,
        options: Mapping[str, Any] | None,
        arguments: TrainingArguments,
        *,
        more_tensors: MoreTensors | None = None,
    ) -> None:
        """Raises RecipeUnusable with the argument that is wrong."""
        for name in arguments:
            if name not in TrainingArguments.__annotations__:
                raise RecipeUnusable(f"there is no argument {name}", where=name, do="See docs/reference/recipes.md.")
        for name in ("min_clients", "train_script"):
            if arguments.get(name) is None:
                raise RecipeUnusable(f"{name} is missing", where=name)
        given = [model for model in (arguments.get("initial_model"), arguments.get("model")) if model is not None]
        checkpoint = arguments.get("initial_ckpt")
        if len(given) > 1 or not (given or checkpoint):
            raise RecipeUnusable("give exactly one of initial_model and model", where="initial_model")
        if arguments.get("delta") is not None:
            arguments = {"params_type": "DIFF", **arguments}
        folder, script = find_script(arguments["train_script"])
        loaded = None if checkpoint is None else load_checkpoint(folder, checkpoint)
        settings, tensors = make_settings(
            recipe=recipe,
            options=options,
            name=arguments.get("name", recipe),
            num_rounds=arguments.get("num_rounds", 2),
            min_clients=arguments["min_clients"],
            train_script=script,
            train_args=arguments.get("train_args", ""),
            params_type=arguments.get("params_type", "DIFF" if arguments.get("watermark") else "FULL"),
            round_seconds=arguments.get("round_seconds", 3600),
            model=given[0] if given else loaded or {},
            loaded=loaded,
            folder=folder,
            more_tensors=more_tensors,
            more={
                "selection": selection_of(arguments),
                "delta": arguments.get("delta"),
                "sites": _site_settings(arguments.get("per_site_config") or {}),
                "aggregator": arguments.get("aggregator"),
                **_secure(arguments.get("secure_aggregation", False)),
                **_marked(arguments.get("watermark", False)),
                **({"robust": dict(robust)} if (robust := arguments.get("robust")) is not None else {}),
            },
        )
        super().__init__(settings, folder, tensors)


def _secure(wanted: bool | Mapping[str, Any]) -> dict[str, Any]:
    """The settings of secure aggregation: True, or some of `fl.jobs.settings.SecureAggregation`. Metrics, which would
    be seen singly, are off until `declare_outputs` names them: then they are summed under masks, too."""
    if wanted is False:
        return {}
    secure = {} if wanted is True else dict(wanted)
    return {"secure_aggregation": secure, "outputs": {"metrics": (), "values": 0}}


def _marked(wanted: bool | Mapping[str, Any]) -> dict[str, Any]:
    return {} if wanted is False else {"watermark": {} if wanted is True else dict(wanted)}


def make_settings(
    *,
    recipe: str,
    name: str,
    num_rounds: int,
    min_clients: int,
    train_script: str,
    train_args: str | Sequence[str],
    params_type: str,
    round_seconds: int,
    model: InitialModel,
    folder: Path,
    options: Mapping[str, Any] | None = None,
    more_tensors: MoreTensors | None = None,
    loaded: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> tuple[JobSettings, dict[str, tuple[TensorSpec, Buffer]]]:
    """Settings and first tensors from a recipe's arguments. Raises RecipeUnusable with the argument that is wrong.

    `options` are the recipe's own settings; `more_tensors` says what travels beside the model's own tensors; `loaded`
    are the numbers of a checkpoint, which the model gets; `more` are settings that all recipes can have.
    """
    model = made_model(model, folder)
    params, framework = _params_of_model(model)
    tensors = tensors_of(params, where="initial_model")
    if loaded is not None:
        tensors = with_numbers(tensors, tensors_of(loaded, where="initial_ckpt"))
    if more_tensors is not None:
        tensors = {**tensors, **more_tensors(model, tensors)}
    try:
        words = tuple(shlex.split(train_args)) if isinstance(train_args, str) else tuple(train_args)
    except ValueError as error:
        raise RecipeUnusable(f"train_args cannot be split into words: {error}", where="train_args") from error
    settings = _checked_settings(
        {
            "name": name,
            "recipe": recipe,
            "options": None if options is None else {"recipe": recipe, **options},
            "num_rounds": num_rounds,
            "min_clients": min_clients,
            "train_script": train_script,
            "train_args": words,
            "framework": framework,
            "params_type": params_type,
            "round_seconds": round_seconds,
            "model": {key: TensorSettings(dtype=spec.dtype, shape=spec.shape) for key, (spec, _) in tensors.items()},
            **(more or {}),
        }
    )
    return settings, tensors


def _checked_settings(document: Mapping[str, Any]) -> JobSettings:
    try:
        return JobSettings.model_validate(document)
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeUnusable(
            f"{first['msg']} (got {first['input']!r:.80})", where=".".join(map(str, first["loc"]))
        ) from error


def selection_of(arguments: TrainingArguments) -> dict[str, Any] | None:
    """How rounds are judged, from FLARE's arguments."""
    metric, mode, stop_at = arguments.get("key_metric"), arguments.get("key_metric_mode"), None
    condition = arguments.get("stop_cond")
    if condition is not None:
        found = re.fullmatch(r"\s*([^<>=]+?)\s*(>=|<=|>|<)\s*([-+0-9.eE]+)\s*", condition)
        try:
            stop_at = float(found[3]) if found else math.nan
        except ValueError:
            stop_at = math.nan
        if found is None or not math.isfinite(stop_at):
            raise RecipeUnusable(
                f"stop_cond {condition!r} is no condition", where="stop_cond", do='Write it as "accuracy >= 0.9".'
            )
        if metric not in (None, found[1]) or mode not in (None, "max" if found[2].startswith(">") else "min"):
            raise RecipeUnusable("stop_cond is not about key_metric and its mode", where="stop_cond")
        metric, mode = found[1], "max" if found[2].startswith(">") else "min"
    if metric is None:
        for name in ("key_metric_mode", "patience"):
            if arguments.get(name) is not None:
                raise RecipeUnusable(f"{name} needs key_metric", where=name)
        return None
    return {"metric": metric, "mode": mode or "max", "patience": arguments.get("patience"), "stop_at": stop_at}


def _site_settings(config: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for site, own in config.items():
        if unknown := sorted(set(own) - {"train_script", "train_args"}):
            raise RecipeUnusable(
                f"{unknown[0]} cannot be set for one site", where="per_site_config", do="train_script, train_args can."
            )
        words = own.get("train_args")
        try:
            found[site] = {**own, "train_args": tuple(shlex.split(words)) if isinstance(words, str) else words}
        except ValueError as error:
            raise RecipeUnusable(f"train_args of {site}: {error}", where="per_site_config") from error
    return found


def _importable(function: Callable[..., Any]) -> str:
    module, name = getattr(function, "__module__", None), getattr(function, "__qualname__", "")
    if module in (None, "__main__") or not name.isidentifier():
        raise RecipeUnusable(
            f"{name or function!r} is in no module that a script can import",
            where="filter",
            do="Put the function into a module of its own in the recipe's folder.",
        )
    return f"{module}:{name}"


def find_script(train_script: str) -> tuple[Path, str]:
    """The recipe's folder, and the script's path in it.

    The folder is that of the file that makes the recipe (the first caller outside this package), so that a job runs
    from wherever it is started; else the working folder; for an absolute path, the script's own.
    """
    path = Path(train_script)
    if path.is_absolute():
        if not path.is_file():
            raise RecipeUnusable(f"there is no file {train_script}", where="train_script")
        return path.parent.resolve(), path.name
    tried = []
    for folder in (_caller_folder(), Path.cwd()):
        if folder is None:
            continue
        script = (folder / path).resolve()
        if script.is_file():
            if not script.is_relative_to(folder.resolve()):
                raise RecipeUnusable(f"{train_script} leads out of the recipe's folder", where="train_script")
            return folder.resolve(), script.relative_to(folder.resolve()).as_posix()
        tried.append(str(folder))
    raise RecipeUnusable(
        f"there is no file {train_script} in {' or '.join(dict.fromkeys(tried))}", where="train_script"
    )


def _caller_folder() -> Path | None:
    here = Path(__file__).resolve().parents[1]
    frame = inspect.currentframe()
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_absolute() and file.is_file() and not file.resolve().is_relative_to(here):
            return file.parent
        if not file.is_absolute() and file.is_file():
            return file.resolve().parent
        if frame.f_code.co_filename.startswith("<"):
            return None  # a notebook or an interactive session: the working folder is the recipe's
        frame = frame.f_back
    return None


def made_model(model: InitialModel, folder: Path) -> InitialModel:
    """The model that `{"class_path", "args"}` describes; any other as it is. Raises RecipeUnusable."""
    if isinstance(model, Mapping) and "class_path" in model:
        made: InitialModel = _instantiate(model, folder)
        return made
    return model


def _params_of_model(model: InitialModel) -> tuple[Mapping[str, Any], Framework]:
    if isinstance(model, Mapping):
        framework: Framework = "pytorch" if any(_is_torch(value) for value in model.values()) else "numpy"
        return model, framework
    state_dict = getattr(model, "state_dict", None)
    if not callable(state_dict):
        raise RecipeUnusable(
            f"a {type(model).__name__} is not a model",
            where="initial_model",
            do='Give a torch module, {"class_path": ..., "args": {...}}, or arrays by name.',
        )
    return state_dict(), "pytorch"


def _is_torch(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "torch"


def _instantiate(model: Mapping[str, Any], folder: Path) -> Any:
    """The object that `{"class_path", "args"}` describes; it is made here, at the author's, never at a server."""
    if set(model) - {"class_path", "args"} or not isinstance(model["class_path"], str):
        raise RecipeUnusable("a model as a map has exactly class_path and args", where="initial_model")
    module, _, name = model["class_path"].rpartition(".")
    if not module:
        raise RecipeUnusable(f"class_path {model['class_path']!r} names no module", where="initial_model")
    sys.path.insert(0, str(folder))
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise RecipeUnusable(f"class_path {model['class_path']!r}: {error}", where="initial_model") from error
    finally:
        sys.path.remove(str(folder))
    return found(**dict(model.get("args") or {}))
