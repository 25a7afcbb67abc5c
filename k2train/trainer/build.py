"""From a program to a run: model, optimizer, data, and the handlers of a rank.

Nothing is trained here and nothing is written. What cannot run is refused here, before any tensor
is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from k2train.activations.store import ActivationStore
from k2train.config.errors import ConfigError
from k2train.config.schema import Config
from k2train.data.corpus import Corpus, build_corpus
from k2train.device.protocol import Device
from k2train.layout.layout import Layout
from k2train.layout.tensors import part_tensors
from k2train.model.model import Model, build_model
from k2train.model.pieces import ModelPart
from k2train.ops.backend import OpsBackend, choose_backend
from k2train.ops.dtypes import DTYPES
from k2train.optim.build import build_optimizer
from k2train.optim.lr_schedule import LrSchedule
from k2train.optim.optimizer import Optimizer
from k2train.parallel.build import build_deepep, build_dispatcher
from k2train.parallel.deepep_dispatcher import check_deepep
from k2train.parallel.groups import Groups
from k2train.parallel.pipeline import PipelineTransport
from k2train.program import Program, compile_program, program_layout
from k2train.runtime.routes import build_routes
from k2train.runtime.stage import PipelineStage
from k2train.schedule import Schedule
from k2train.trainer.activations import build_activations


@dataclasses.dataclass(frozen=True)
class Run:
    """One rank's share of a run. Made by `build_run`; a step changes parameters, optimizer and
    biases in place."""

    program: Program
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
    def config(self) -> Config:
        return self.program.config

    @property
    def layout(self) -> Layout:
        return self.program.layout

    @property
    def schedule(self) -> Schedule:
        """Training's action lists."""
        return self.program.schedule

    @property
    def pp_rank(self) -> int:
        return self.groups.pp.rank

    @property
    def is_main(self) -> bool:
        """Whether this rank speaks for the run: it prints, writes metrics and completes
        checkpoints."""
        return self.groups.world.rank == 0

    @property
    def num_microbatches(self) -> int:
        """Microbatches of this pipeline in a step."""
        return self.schedule.num_microbatches


def check_supported(config: Config) -> None:
    """Refuse what can be planned but not trained, by name (docs/decisions/0022-one-program.md).
    Raises ConfigError."""
    if config.schedule.kind == "dualpipe":
        raise ConfigError(
            "schedule.kind",
            "dualpipe",
            "holds every parameter twice on each pipeline, and training sums no gradients over the two "
            "copies; it is there to be planned and compared",
            "set schedule=dualpipe_v, which folds it onto one copy, or k2, interleaved_1f1b, 1f1b, zb_h1 or gpipe",
        )


def choose_device(config: Config) -> torch.device:
    """`train.device`, with auto taking a GPU where there is one."""
    available = torch.cuda.is_available()
    if config.train.device == "cuda" and not available:
        raise ConfigError(
            "train.device", "cuda", "this machine shows no CUDA device", "set train.device=auto or cpu"
        )
    return torch.device("cuda" if available and config.train.device != "cpu" else "cpu")


def build_program(config: Config) -> Program:
    """The program of a run, its action lists proved; pure, and refused here if it cannot run.
    Raises ConfigError."""
    check_supported(config)
    if config.layout.dispatch == "deepep" and config.layout.ep > 1:
        # Where it cannot run at all, no other size of the batch is a remedy.
        program_layout(config)
        check_deepep(choose_device(config), DTYPES[config.train.dtype], config.model.hidden_size)
    # The same function that `plan` calls: what it predicts is what runs here.
    program = compile_program(config)
    _ = program.report
    return program


def open_corpus(config: Config) -> Corpus:
    """The run's data; ranks that are threads share one.

    Raises ConfigError, marked as local: what a file system holds, one machine may find amiss and
    the others not.
    """
    try:
        return build_corpus(config.data, config.train.seq_len, config.train.seed, config.model.vocab_size)
    except ConfigError as error:
        error.local = True
        raise


def build_run(
    program: Program, corpus: Corpus, groups: Groups, device: Device, initialise: bool = True
) -> Run:
    """One rank's share of the run. Every rank calls it; only DeepEP's buffer, where layout.dispatch
    asks for it, communicates.

    initialise: fill the weights from the seed; False leaves them as memory is.
    """
    config, layout, stage = program.config, program.layout, groups.pp.rank
    train, model = config.train, config.model
    backend = choose_backend(config.ops, model, train.dtype, config.optim.tau, device.torch_device)
    models = build_models(config, layout, groups, device, backend, initialise)
    optimizer = build_model_optimizer(config, models, groups, device)
    routes = build_routes(program.schedule, stage)
    transport = (
        None
        if groups.channels is None
        else PipelineTransport(groups.channels, model.hidden_size, DTYPES[train.dtype], device.torch_device)
    )
    return Run(
        program=program,
        groups=groups,
        device=device,
        backend=backend,
        models=models,
        optimizer=optimizer,
        activations=build_activations(program, stage, device),
        corpus=corpus,
        learning_rate=LrSchedule(config.optim.lr_phases, train.steps, train.global_batch_tokens),
        training=PipelineStage(models, routes, transport, optimizer.gradients, device),
        evaluation=PipelineStage(models, routes, transport, None, device),
    )


def build_model_optimizer(
    config: Config, models: Mapping[int, Model], groups: Groups, device: Device
) -> Optimizer:
    """The optimizer of a rank's virtual stages; it communicates with nobody. Raises ConfigError."""
    catalogue = {
        spec.name: spec
        for model in models.values()
        for spec in part_tensors(
            config.model, model.part.layers, model.part.embedding, model.part.head, model.part.local_experts
        )
    }
    trained = {
        virtual_stage: [piece for piece in model.pieces() if piece.trained]
        for virtual_stage, model in models.items()
    }
    return build_optimizer(config.optim, config.model, catalogue, trained, groups, device)


def build_models(
    config: Config,
    layout: Layout,
    groups: Groups,
    device: Device,
    backend: OpsBackend | None = None,
    initialise: bool = True,
) -> dict[int, Model]:
    """The model parts of this rank's virtual stages, by virtual stage, in the order of the model.

    backend: None for stock attention.
    """
    mine = tuple(layout.local_experts(groups.ep.rank))
    if layout.dispatch == "deepep" and layout.ep > 1:
        dispatcher = build_deepep(config, groups, device)
    else:
        dispatcher = build_dispatcher(config.model.n_routed_experts, groups, device, layout.relay_parts)
    models = {}
    for virtual_stage in layout.virtual_stages_of(groups.pp.rank):
        piece = layout.virtual_stages[virtual_stage]
        part = ModelPart(tuple(piece.layers), piece.embedding, piece.head, mine)
        model = build_model(
            config.model, part, DTYPES[config.train.dtype], device.torch_device, dispatcher, backend
        )
        if initialise:
            model.initialise(config.train.seed)
        models[virtual_stage] = model
    return models
