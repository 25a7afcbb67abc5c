"""From a config to everything a run is made of: layout, schedule, model, optimizer, data.

Nothing is trained here and nothing is written. What cannot run is refused here, before any tensor is made.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import torch

from k2train.activations.store import ActivationStore
from k2train.config.errors import ConfigError
from k2train.config.model import ModelConfig
from k2train.config.schema import Config
from k2train.data.corpus import Corpus, build_corpus
from k2train.device.protocol import Device
from k2train.estimate.activations import check_policies
from k2train.layout.build import build_layout, num_microbatches
from k2train.layout.layout import Layout
from k2train.layout.tensors import TensorSpec, embedding_tensors, head_tensors, layer_tensors
from k2train.model.dispatcher import Dispatcher, LocalDispatcher
from k2train.model.model import Model, build_model
from k2train.model.pieces import ModelPart
from k2train.ops.backend import OpsBackend, choose_backend
from k2train.ops.dtypes import DTYPES
from k2train.optim.build import build_optimizer
from k2train.optim.lr_schedule import LrSchedule
from k2train.optim.optimizer import Optimizer
from k2train.parallel.deepep_dispatcher import DeepEPDispatcher, build_buffer, check_deepep
from k2train.parallel.dispatcher import AllToAllDispatcher
from k2train.parallel.groups import Groups
from k2train.parallel.pipeline import PipelineTransport
from k2train.parallel.relay_dispatcher import RelayDispatcher
from k2train.parallel.side_stream import SideStream
from k2train.planner.assemble import schedule_spec
from k2train.runtime.stage import PipelineStage, Route
from k2train.schedule import Schedule, build_schedule, validate
from k2train.schedule.errors import told_as_config
from k2train.trainer.activations import build_activations


@dataclasses.dataclass(frozen=True)
class Run:
    """One rank's share of a run. Made by `build_run`; a step changes parameters, optimizer and biases in place."""

    config: Config
    layout: Layout
    schedule: Schedule
    groups: Groups
    device: Device
    backend: OpsBackend
    models: Mapping[int, Model]
    optimizer: Optimizer
    activations: ActivationStore | None
    corpus: Corpus
    learning_rate: LrSchedule
    training: PipelineStage
    evaluation: PipelineStage

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for the run: it prints, writes metrics and completes checkpoints."""
        return self.groups.world.rank == 0

    @functools.cached_property
    def local_index(self) -> Mapping[int, int]:
        """The place of each virtual stage among this rank's, as the optimizer counts them."""
        return {virtual_stage: index for index, virtual_stage in enumerate(self.models)}

    @property
    def num_microbatches(self) -> int:
        """Microbatches of this pipeline in a step."""
        return self.schedule.num_microbatches


def check_supported(config: Config) -> None:
    """Refuse what can be planned but not trained yet, by name."""
    if config.schedule.kind in ("dualpipe", "dualpipe_v"):
        raise ConfigError("schedule.kind", config.schedule.kind, "is there to be planned and compared, not to be trained",
                          "set schedule=k2, interleaved_1f1b, 1f1b, zb_h1 or gpipe")  # fmt: skip
    check_policies(config.activations)


def choose_device(config: Config) -> torch.device:
    """`train.device`, with auto taking a GPU where there is one."""
    available = torch.cuda.is_available()
    if config.train.device == "cuda" and not available:
        raise ConfigError(
            "train.device", "cuda", "this machine shows no CUDA device", "set train.device=auto or cpu"
        )
    return torch.device("cuda" if available and config.train.device != "cpu" else "cpu")


def build_layouts(config: Config) -> tuple[Layout, Schedule]:
    """The layout and the validated schedule of a run; pure, and refused here if they cannot run."""
    check_supported(config)
    layout = build_layout(config.layout, config.cluster, config.model, config.train.seq_len)
    if layout.dispatch == "deepep" and layout.ep > 1:
        check_deepep(choose_device(config), DTYPES[config.train.dtype], config.model.hidden_size)
    # The same function that `plan` calls: what it predicts is what runs here.
    schedule = build_schedule(schedule_spec(config, num_microbatches(config.train, layout)))
    with told_as_config(config.schedule):
        validate(schedule)
    return layout, schedule


def open_corpus(config: Config) -> Corpus:
    """The run's data; ranks that are threads share one.

    Raises ConfigError, marked as local: what a file system holds, one machine may find amiss and the others not.
    """
    try:
        return build_corpus(config.data, config.train.seq_len, config.train.seed, config.model.vocab_size)
    except ConfigError as error:
        error.local = True
        raise


def build_run(
    config: Config,
    layout: Layout,
    schedule: Schedule,
    corpus: Corpus,
    groups: Groups,
    device: Device,
    initialise: bool = True,
) -> Run:
    """One rank's share of the run. Every rank calls it; only DeepEP's buffer, where layout.dispatch
    asks for it, communicates.

    initialise: fill the weights from the seed; False leaves them as memory is.
    """
    backend = choose_backend(
        config.ops, config.model, config.train.dtype, config.optim.tau, device.torch_device
    )
    models = build_models(config, layout, groups, device, backend, initialise)
    catalogue = {
        spec.name: spec for model in models.values() for spec in part_tensors(config.model, model.part)
    }
    trained = [[piece for piece in model.pieces() if piece.trained] for model in models.values()]
    optimizer = build_optimizer(config.optim, config.model, catalogue, trained, groups, device)
    routes = build_routes(schedule, groups.pp.rank)
    dtype = DTYPES[config.train.dtype]
    channels = groups.channels
    transport = (
        None
        if channels is None
        else PipelineTransport(channels, config.model.hidden_size, dtype, device.torch_device)
    )
    learning_rate = LrSchedule(config.optim.lr_phases, config.train.steps, config.train.global_batch_tokens)
    return Run(
        config=config,
        layout=layout,
        schedule=schedule,
        groups=groups,
        device=device,
        backend=backend,
        models=models,
        optimizer=optimizer,
        activations=build_activations(
            config, layout, groups.pp.rank, schedule.stages[groups.pp.rank], device
        ),
        corpus=corpus,
        learning_rate=learning_rate,
        training=PipelineStage(models, routes, transport, optimizer.gradients, device),
        evaluation=PipelineStage(models, routes, transport, None, device),
    )


def build_deepep(config: Config, groups: Groups, device: Device) -> Dispatcher:
    """DeepEP's dispatcher. Every rank of the ep group must call it; raises ConfigError where it cannot run."""
    check_deepep(device.torch_device, DTYPES[config.train.dtype], config.model.hidden_size)
    buffer = build_buffer(groups.ep, config.model.hidden_size)
    return DeepEPDispatcher(buffer, config.model.n_routed_experts, SideStream(device))


def build_dispatcher(num_experts: int, groups: Groups, device: Device, num_parts: int = 1) -> Dispatcher:
    """How this rank's tokens reach their experts. It communicates with nobody."""
    if groups.ep.size == 1:
        return LocalDispatcher(device)
    side = SideStream(device)
    if groups.relay is None:
        return AllToAllDispatcher(groups.ep, num_experts, side)
    return RelayDispatcher(groups.ep, groups.relay, groups.rail, num_experts, side, num_parts)


def build_models(
    config: Config,
    layout: Layout,
    groups: Groups,
    device: Device,
    backend: OpsBackend | None = None,
    initialise: bool = True,
) -> dict[int, Model]:
    """The model parts of this rank's virtual stages, in the order of the model. backend: None for stock attention."""
    experts = config.model.n_routed_experts
    per_rank = experts // layout.ep
    mine = tuple(range(groups.ep.rank * per_rank, (groups.ep.rank + 1) * per_rank))
    if layout.dispatch == "deepep" and layout.ep > 1:
        dispatcher = build_deepep(config, groups, device)
    else:
        dispatcher = build_dispatcher(experts, groups, device, layout.relay_parts)
    models = {}
    for virtual_stage, piece in enumerate(layout.virtual_stages):
        if layout.placement[virtual_stage] != groups.pp.rank:
            continue
        part = ModelPart(tuple(piece.layers), piece.embedding, piece.head, mine)
        model = build_model(
            config.model, part, DTYPES[config.train.dtype], device.torch_device, dispatcher, backend
        )
        if initialise:
            model.initialise(config.train.seed)
        models[virtual_stage] = model
    return models


def part_tensors(model: ModelConfig, part: ModelPart) -> Iterator[TensorSpec]:
    """The catalogue of one virtual stage. The whole model's has 70,000 entries for K2, too many to list on 256 ranks."""
    if part.embedding:
        yield from embedding_tensors(model)
    for layer in part.layers:
        yield from layer_tensors(model, layer, part.local_experts)
    if part.head:
        yield from head_tensors(model)


def build_routes(schedule: Schedule, stage: int) -> dict[int, Route]:
    """Where the messages of this stage's virtual stages go."""
    placement = schedule.placement
    routes = {}
    for virtual_stage in (v for v, place in enumerate(placement) if place == stage):
        before, after = schedule.previous[virtual_stage], schedule.next[virtual_stage]
        routes[virtual_stage] = Route(
            stage=stage,
            previous=before,
            next=after,
            previous_stage=stage if before is None else placement[before],
            next_stage=stage if after is None else placement[after],
        )
    return routes
