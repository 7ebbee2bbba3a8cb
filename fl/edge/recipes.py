"""EdgeFedBuffRecipe and ETFedBuffRecipe: train one model on many devices, asynchronously, by NVIDIA FLARE's names.

Both export the training graph from the model and the shapes of a batch, so that an installed app trains a new model
without new code. In SimEnv the devices are simulated: EdgeFedBuffRecipe's train by PyTorch, ETFedBuffRecipe's run the
exported graph by ExecuTorch's runtime, as a phone does.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from fl.aggregation.fixed_point import MAX_WEIGHT
from fl.edge.device_model import DeviceModel
from fl.edge.evaluating import evaluation_files
from fl.edge.kits.python.trainer import training_params
from fl.edge.masks import DeviceMasking
from fl.edge.settings import DeviceManagerConfig, DevicePrivacy, EdgeSettings, EvaluatorConfig, ModelManagerConfig
from fl.edge.simulation.population import PopulationSettings
from fl.edge.simulation.processors import DataOf, TaskProcessor
from fl.edge.simulation.torch_processors import ExecuTorchProcessor, TorchProcessor
from fl.edge.training_graph import export_training_graph
from fl.environments.sim import SimEnv
from fl.errors import RecipeUnusable
from fl.recipes.recipe import Environment, InitialModel, Recipe, make_settings, selection_of
from fl.tensors import FLOATS

if TYPE_CHECKING:
    from fl.jobs.bundle import Bundle
    from fl.run import Run

GRAPH_FILE: Final = "training.pte"
DEFAULTS: Final[Mapping[str, Any]] = {"epoch": 1, "batch_size": 32, "lr": 0.1}


@dataclass(frozen=True)
class SimulationConfig:
    """The simulated devices, for SimEnv and PocEnv.

    - `task_processor`: a function of a device's number that gives its inputs and labels; or, for SimEnv alone, an
      object that trains devices in a way of its own (`fl.edge.simulation.processors.TaskProcessor`).
    - `job_timeout`: real seconds after which the job ends as it is (in PocEnv: devices go, and the job is aborted if
      nothing else ends it).
    - `num_devices`: devices of each leaf: the environment's clients are the leaves.
    - `num_workers`: processes that train (in PocEnv: threads).
    - `population`: what the devices are like; by default all are always there, and none vanishes.
    """

    task_processor: DataOf | TaskProcessor
    job_timeout: float = 60.0
    num_devices: int = 1000
    num_workers: int = 10
    population: PopulationSettings | None = None

    def __post_init__(self) -> None:
        if not (callable(self.task_processor) or isinstance(self.task_processor, TaskProcessor)):
            raise RecipeUnusable("it is neither a function nor an object with train", where="task_processor")
        for name, least, most in (("job_timeout", 0.1, 1e7), ("num_devices", 1, 10_000_000), ("num_workers", 1, 256)):
            if not least <= getattr(self, name) <= most:
                raise RecipeUnusable(f"{name} is not from {least:g} to {most:g}", where=name)


class EdgeFedBuffRecipe(Recipe):
    """Train one model on devices by FedBuff."""

    def __init__(
        self,
        job_name: str,
        model: InitialModel | DeviceModel | None = None,
        model_manager_config: ModelManagerConfig | None = None,
        device_manager_config: DeviceManagerConfig | None = None,
        initial_ckpt: str | Path | None = None,
        evaluator_config: EvaluatorConfig | None = None,
        simulation_config: SimulationConfig | None = None,
        custom_source_root: str | Path | None = None,
        device_wait_timeout: float | None = None,
        *,
        device_model: DeviceModel | None = None,
        input_shape: Sequence[int] | None = None,
        output_shape: Sequence[int] | None = None,
        device_training_params: Mapping[str, Any] | None = None,
        privacy: DevicePrivacy | None = None,
        secure_aggregation: DeviceMasking | None = None,
        max_norm: float | None = None,
        max_weight: float = 1e6,
        task_seconds: float = 600.0,
        stop_cond: str | None = None,
        patience: int | None = None,
    ) -> None:
        """Arguments (docs/reference/edge.md has each):

        - `job_name`: the job's name: lower-case letters, digits, `.`, `_`, `-`.
        - `model` or `device_model`: the network, or a DeviceModel of it with its loss (cross entropy by default).
        - `model_manager_config`, `device_manager_config`: how updates make versions; how many devices train at once.
        - `initial_ckpt`: a file, `.safetensors` or `.npy`, whose numbers the first version has.
        - `evaluator_config`: how the root evaluates versions.
        - `simulation_config`: the devices of SimEnv and PocEnv.
        - `custom_source_root`: a folder from which the processor's code is imported, in SimEnv.
        - `device_wait_timeout`: seconds without any device that asks, after which the job stops.
        - `input_shape`, `output_shape`: of a batch of inputs (float32), and of labels (int64) as the loss takes them;
          the training graph is exported for them.
        - `device_training_params`: `epoch`, `batch_size`, `lr`, `momentum`, `weight_decay`, and what else an app reads.
        - `privacy`: clip each device's contribution, and add noise at the root.
        - `secure_aggregation`: gateways see sums of devices alone; each device bounds what it contributes by itself.
        - `max_norm`, `max_weight`: what any one device may contribute; without privacy, which bounds it itself.
        - `task_seconds`: a device has so long for a task.
        - `stop_cond`, `patience`: as FedAvgRecipe's, over the evaluator's accuracy.

        Raises RecipeUnusable with the argument that is wrong.
        """
        given = [one for one in (model, device_model) if one is not None]
        if len(given) != 1:
            raise RecipeUnusable("give exactly one of model and device_model", where="model")
        self.device_model = _device_model(given[0])
        self.evaluator_config = evaluator_config
        self.simulation_config = simulation_config
        self.input_shape = None if input_shape is None else tuple(input_shape)
        self.output_shape = None if output_shape is None else tuple(output_shape)
        config = {**DEFAULTS, **(device_training_params or {})}
        if self.input_shape is not None:
            config["batch_size"] = self.input_shape[0]
        training_params(config)
        if custom_source_root is not None:
            if not Path(custom_source_root).is_dir():
                raise RecipeUnusable(f"{custom_source_root} is no folder", where="custom_source_root")
            sys.path.insert(0, str(Path(custom_source_root).resolve()))
        if secure_aggregation is not None:
            config |= _masking(secure_aggregation, privacy, max_norm, max_weight).config()
        edge = EdgeSettings(
            models=model_manager_config or ModelManagerConfig(),
            devices=device_manager_config or DeviceManagerConfig(),
            device_wait_timeout=device_wait_timeout,
            privacy=privacy,
            max_norm=max_norm,
            max_weight=max_weight,
            task_seconds=task_seconds,
            eval_frequency=None if evaluator_config is None else evaluator_config.eval_frequency,
        )
        selection = None
        if evaluator_config is not None or stop_cond is not None or patience is not None:
            judged: dict[str, Any] = {"key_metric": "accuracy", "stop_cond": stop_cond, "patience": patience}
            selection = selection_of(judged)  # type: ignore[arg-type]
        if evaluator_config is None and selection is not None:
            raise RecipeUnusable("they are over what an evaluator measures", where="stop_cond, patience")
        from fl.recipes.checkpoints import load_checkpoint

        folder = Path.cwd()
        settings, tensors = make_settings(
            recipe="fedbuff",
            options={"edge": edge.model_dump(), "config": config},
            name=job_name,
            num_rounds=edge.models.max_model_version - 1,
            min_clients=edge.devices.initial_min_client_num,
            train_script=GRAPH_FILE,
            train_args=(),
            params_type="DIFF",
            round_seconds=3600,
            model=self.device_model.net,
            folder=folder,
            loaded=None if initial_ckpt is None else load_checkpoint(folder, initial_ckpt),
            more={"selection": selection, "outputs": {"metrics": (), "values": 0}},
        )
        whole = [name for name, spec in settings.model.items() if spec.dtype not in FLOATS]
        if whole:
            raise RecipeUnusable(
                f"tensor {whole[0]!r} is no tensor of floats, which devices could train", where="model"
            )
        super().__init__(settings, folder, tensors)

    def training_graph(self) -> bytes:
        """The training graph for devices (.pte). Raises RecipeUnusable, Unusable."""
        if self.input_shape is None or self.output_shape is None:
            raise RecipeUnusable(
                "devices train an exported graph: the shapes of a batch are missing", where="input_shape, output_shape"
            )
        inputs = torch.zeros(self.input_shape)
        labels = torch.zeros(self.output_shape, dtype=torch.int64)
        return export_training_graph(self.device_model.net, self.device_model.loss, inputs, labels)

    def bundle(self) -> Bundle:
        """The job's bundle: the training graph, the evaluation if there is one, and nothing of the author's folder,
        since no other code runs."""
        from fl.jobs.bundle import make_bundle

        with tempfile.TemporaryDirectory() as nothing:
            evaluator, files = self.evaluator_config, {GRAPH_FILE: self.training_graph()}
            if evaluator is not None:
                files |= evaluation_files(self.device_model.net, evaluator)
            return make_bundle(Path(nothing), self.settings, {**files, **self.added})

    def simulation(self) -> SimulationConfig:
        """The simulated devices. Raises RecipeUnusable without them."""
        if self.simulation_config is None:
            raise RecipeUnusable("devices are simulated here: give a SimulationConfig", where="simulation_config")
        return self.simulation_config

    def processor(self) -> TaskProcessor:
        """What trains the simulated devices."""
        given = self.simulation().task_processor
        if isinstance(given, TaskProcessor):
            return given
        return self._processor_of(given, self._config)

    def _processor_of(self, data_of: DataOf, config: Mapping[str, Any]) -> TaskProcessor:
        return TorchProcessor(self.device_model, config, data_of)

    @property
    def _config(self) -> Mapping[str, Any]:
        options = self.settings.options
        return {} if options is None else dict(getattr(options, "config", {}))

    def execute(self, env: Environment) -> Run:
        """Run the job in `env`: in SimEnv with simulated devices, to its end; in PocEnv simulated devices speak with
        its gateways while it goes on; ProdEnv has devices of its own. Raises RecipeUnusable."""
        return super().execute(_SimulatedDevices(env) if isinstance(env, SimEnv) else env)


class ETFedBuffRecipe(EdgeFedBuffRecipe):
    """EdgeFedBuffRecipe whose devices run the exported graph, in SimEnv too. Needs ExecuTorch, and the shapes."""

    def __init__(
        self,
        job_name: str,
        device_model: DeviceModel,
        input_shape: Sequence[int],
        output_shape: Sequence[int],
        model_manager_config: ModelManagerConfig | None = None,
        device_manager_config: DeviceManagerConfig | None = None,
        initial_ckpt: str | Path | None = None,
        evaluator_config: EvaluatorConfig | None = None,
        simulation_config: SimulationConfig | None = None,
        device_training_params: Mapping[str, Any] | None = None,
        custom_source_root: str | Path | None = None,
        device_wait_timeout: float | None = None,
        **more: Any,
    ) -> None:
        """See EdgeFedBuffRecipe; `more` are its further arguments. Raises RecipeUnusable, Unusable."""
        super().__init__(
            job_name,
            device_model=device_model,
            input_shape=input_shape,
            output_shape=output_shape,
            model_manager_config=model_manager_config,
            device_manager_config=device_manager_config,
            initial_ckpt=initial_ckpt,
            evaluator_config=evaluator_config,
            simulation_config=simulation_config,
            device_training_params=device_training_params,
            custom_source_root=custom_source_root,
            device_wait_timeout=device_wait_timeout,
            **more,
        )
        self._graph = super().training_graph()

    def training_graph(self) -> bytes:
        """The training graph, exported once."""
        return self._graph

    def _processor_of(self, data_of: DataOf, config: Mapping[str, Any]) -> TaskProcessor:
        return ExecuTorchProcessor(self._graph, config, data_of)


@dataclass(frozen=True, slots=True)
class _SimulatedDevices:
    """SimEnv for edge jobs."""

    env: SimEnv

    def execute(self, recipe: Recipe) -> Run:
        from fl.environments.devices import simulate_job

        if not isinstance(recipe, EdgeFedBuffRecipe):
            raise TypeError("only an edge job has devices")
        return simulate_job(self.env, recipe)


def _masking(
    given: DeviceMasking, privacy: DevicePrivacy | None, max_norm: float | None, max_weight: float
) -> DeviceMasking:
    """What a task says of masks: a device does by itself what a gateway cannot do any more."""
    most = MAX_WEIGHT if privacy is None else 1.0
    clip = max_norm if privacy is None else privacy.clip_norm
    return DeviceMasking.model_validate(
        {
            **given.model_dump(),
            "clip_norm": clip or given.clip_norm,
            "max_weight": min(most, max_weight, given.max_weight),
        }
    )


def _device_model(given: Any) -> DeviceModel:
    if isinstance(given, DeviceModel):
        return given
    if isinstance(given, Mapping) and "class_path" in given:
        from fl.recipes.recipe import made_model

        given = made_model(given, Path.cwd())
    if not isinstance(given, torch.nn.Module):
        raise RecipeUnusable(f"a {type(given).__name__} is no torch module", where="model")
    net, loss = getattr(given, "net", None), getattr(given, "loss", None)
    if isinstance(net, torch.nn.Module) and isinstance(loss, torch.nn.Module):
        return DeviceModel(net, loss)
    return DeviceModel(given)
