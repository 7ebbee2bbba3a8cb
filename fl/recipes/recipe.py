"""What every recipe is: settings, a first model and a folder of code, to be executed in an environment."""

from __future__ import annotations

import importlib
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, Required, TypeAlias, TypedDict

from pydantic import ValidationError

from fl.errors import RecipeUnusable
from fl.jobs.settings import JobSettings, TensorSettings
from fl.model import Framework, tensors_of
from fl.tensors import Buffer, TensorSpec, encode_into, layout
from fl.transport.memory import DraftMemory, SealedMemory

if TYPE_CHECKING:
    import torch

    from fl.run import Run

InitialModel: TypeAlias = "torch.nn.Module | Mapping[str, Any]"
"""A torch module, `{"class_path": ..., "args": {...}}` for one, or arrays or tensors by name."""

MoreTensors: TypeAlias = Callable[
    [InitialModel, Mapping[str, tuple[TensorSpec, Buffer]]], Mapping[str, tuple[TensorSpec, Buffer]]
]
"""From a model and its tensors, what else travels with them (control variates)."""

EXPORT_VARIABLE: Final = "SEAL_EXPORT_BUNDLE"
"""With this environment variable set, `execute` writes the job's bundle and first model there instead of running it."""


class Environment(Protocol):
    """Where a recipe runs."""

    def execute(self, recipe: Recipe) -> Run:
        """Start the recipe's job and return its run."""


class Recipe:
    """A job that can be executed anywhere: what it asks for (`settings`), its code (`folder`), its first model."""

    def __init__(self, settings: JobSettings, folder: Path, tensors: Mapping[str, tuple[TensorSpec, Buffer]]) -> None:
        self.settings = settings
        self.folder = folder
        self._tensors = tensors

    @property
    def name(self) -> str:
        """The job's name."""
        return self.settings.name

    def first_model(self) -> SealedMemory:
        """The first global model, as one safetensors file in sealed memory, the caller's to close."""
        _, _, size = layout({name: spec for name, (spec, _) in self._tensors.items()})
        with DraftMemory(size) as draft:
            encode_into(draft.view, self._tensors)
            return SealedMemory(*draft.seal())

    def execute(self, env: Environment) -> Run:
        """Run the job in `env`. SimEnv returns when it has ended, ProdEnv when it is submitted."""
        target = os.environ.get(EXPORT_VARIABLE)
        if target:
            self.export(Path(target))
            raise SystemExit(0)
        return env.execute(self)

    def export(self, folder: Path) -> str:
        """Write `job.bundle` and `model.safetensors` into `folder`; the bundle's digest."""
        from fl.jobs.bundle import make_bundle

        bundle = make_bundle(self.folder, self.settings)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "job.bundle").write_bytes(bundle.raw)
        with self.first_model() as model:
            (folder / "model.safetensors").write_bytes(model.view)
        return bundle.digest


class TrainingArguments(TypedDict, total=False):
    """The arguments that every recipe of rounds of training shares; docs/reference/recipes.md has each."""

    name: str
    initial_model: InitialModel | None
    model: InitialModel | None
    min_clients: Required[int]
    num_rounds: int
    train_script: Required[str]
    train_args: str | Sequence[str]
    params_type: Literal["FULL", "DIFF"]
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
        given = [model for model in (arguments.get("initial_model"), arguments.get("model")) if model is not None]
        if len(given) != 1:
            raise RecipeUnusable("give exactly one of initial_model and model", where="initial_model")
        folder, script = find_script(arguments["train_script"])
        settings, tensors = make_settings(
            recipe=recipe,
            options=options,
            name=arguments.get("name", recipe),
            num_rounds=arguments.get("num_rounds", 2),
            min_clients=arguments["min_clients"],
            train_script=script,
            train_args=arguments.get("train_args", ""),
            params_type=arguments.get("params_type", "FULL"),
            round_seconds=arguments.get("round_seconds", 3600),
            model=given[0],
            folder=folder,
            more_tensors=more_tensors,
        )
        super().__init__(settings, folder, tensors)


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
) -> tuple[JobSettings, dict[str, tuple[TensorSpec, Buffer]]]:
    """Settings and first tensors from a recipe's arguments. Raises RecipeUnusable with the argument that is wrong.

    `options` are the recipe's own settings; `more_tensors` says what travels beside the model's own tensors.
    """
    model = _made(model, folder)
    params, framework = _params_of_model(model)
    tensors = tensors_of(params, where="initial_model")
    if more_tensors is not None:
        tensors = {**tensors, **more_tensors(model, tensors)}
    try:
        words = tuple(shlex.split(train_args)) if isinstance(train_args, str) else tuple(train_args)
        settings = JobSettings.model_validate(
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
                "model": {
                    key: TensorSettings(dtype=spec.dtype, shape=spec.shape) for key, (spec, _) in tensors.items()
                },
            }
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeUnusable(
            f"{first['msg']} (got {first['input']!r:.80})", where=".".join(map(str, first["loc"]))
        ) from error
    except ValueError as error:
        raise RecipeUnusable(f"train_args cannot be split into words: {error}", where="train_args") from error
    return settings, tensors


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


def _made(model: InitialModel, folder: Path) -> InitialModel:
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
