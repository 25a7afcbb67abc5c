"""Every call from the sections into k2train's operations, model and trainer, in one place.

What a section measures and how is its own affair; what the program's parts are called and take is
written here.

Letters: T tokens, M rows of all experts, L experts, I input features, O output features, D hidden,
V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from k2train.config.schema import Config
from k2train.device.build import build_device
from k2train.model.context import MicrobatchContext, Statistics
from k2train.model.loss import CrossEntropy
from k2train.model.model import Model, build_model
from k2train.model.phase import Phase, Tensors
from k2train.model.pieces import ModelPart
from k2train.model.saved import KeepEverything, SavedActivations
from k2train.ops.attention import causal_attention, causal_attention_reference
from k2train.ops.backend import OpsBackend, choose_backend
from k2train.ops.cross_entropy import linear_cross_entropy
from k2train.ops.grouped import grouped_linear
from k2train.ops.kernels import gpu_kernels
from k2train.ops.weight_grad import AtOnce, PlainGradients, WeightGradQueue, add_product_into
from k2train.parallel.groups import build_groups
from k2train.runtime.executor import run_actions
from k2train.runtime.routes import build_routes
from k2train.runtime.stage import PipelineStage, StepInputs
from k2train.trainer.activations import build_activations, host_traffic
from k2train.trainer.batch import read_batch
from k2train.trainer.build import Run, build_program, build_run
from k2train.trainer.step import StepMetrics, train_step
from k2train.trainer.worlds import run_world
from k2train.update_rules.rules.muon import newton_schulz

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]

# Operations.


def backend(config: Config, device: torch.device) -> OpsBackend:
    """Whose kernels a run of this config takes on this device."""
    return choose_backend(config.ops, config.model, config.train.dtype, config.optim.tau, device)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, taken: OpsBackend
) -> tuple[torch.Tensor, torch.Tensor]:
    """The program's attention: output (B, S, H, V), largest logit of each head.

    The program makes queries, keys and values in the order that cuDNN wants; here they are turned,
    in its time.
    """
    if taken.heads_inside:
        q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    attended = causal_attention(q, k, v, scale, backend=taken)
    return attended.out, attended.max_logits


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with all scores at once, in the inputs' type."""
    return causal_attention_reference(q, k, v, scale)


def attention_kernels(device: torch.device) -> ModuleType | None:
    """The module of our Triton attention; None where it cannot run. On a CPU it is interpreted (see
    `child`)."""
    if device.type == "cpu":
        found = importlib.util.find_spec("triton") is not None
        return importlib.import_module("k2train.ops.attention_triton") if found else None
    return gpu_kernels("attention_triton", device)


def kernel_attention(kernels: ModuleType) -> Attend:
    """Our Triton attention, whatever the program would take: the output alone."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        # Triton's interpreter, which runs it on a CPU, cannot multiply in BF16.
        tensors = (q, k, v) if q.is_cuda else (q.float(), k.float(), v.float())
        return kernels.fused_attention(*tensors, scale)[0].to(q.dtype)

    return attend


@contextlib.contextmanager
def other_blocks(kernels: ModuleType, name: str, **changes: int) -> Iterator[None]:
    """The kernels with other block sizes, read when they are launched; the program's own come back
    afterwards.

    name: of a module's Blocks, or of its function from widths to Blocks.
    """
    own = getattr(kernels, name)

    def changed(query: int, value: int) -> Any:
        return dataclasses.replace(own(query, value), **changes)

    setattr(kernels, name, changed if callable(own) else dataclasses.replace(own, **changes))
    try:
        yield
    finally:
        setattr(kernels, name, own)


def grouped(
    x_MI: torch.Tensor, weight_LOI: torch.Tensor, ends_L: torch.Tensor, gradients: PlainGradients
) -> torch.Tensor:
    """The experts' product; its weight gradient goes into an FP32 buffer of `gradients`, as in
    training."""
    return grouped_linear(x_MI, weight_LOI, ends_L, AtOnce(gradients))


def new_gradients() -> PlainGradients:
    return PlainGradients()


def add_weight_gradient(buffer_OI: torch.Tensor, dy_TO: torch.Tensor, x_TI: torch.Tensor) -> None:
    """The program's own buffer += dy^T x."""
    add_product_into(buffer_OI, dy_TO, x_TI)


def head_loss(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, targets_T: torch.Tensor, buffer_VD: torch.Tensor
) -> torch.Tensor:
    """Chunked loss, with the weight's gradient added into `buffer_VD`."""
    return linear_cross_entropy(
        hidden_TD, weight_VD, targets_T, 1 / targets_T.numel(), functools.partial(add_product_into, buffer_VD)
    )


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    return newton_schulz(matrices)


def pinned_bytes(device: torch.device, num_bytes: int) -> Any:
    """Host memory as the program's copies use it; its `bytes` live as long as what is returned."""
    return build_device(device).pages(num_bytes)


# A layer.


@dataclasses.dataclass
class Layer:
    """The phases of a model's layers on one rank, and what one microbatch needs."""

    config: Config
    model: Model
    device: torch.device
    gradients: PlainGradients

    @property
    def phases(self) -> Sequence[Phase]:
        return self.model.phases

    def context(self, saved: Any, queue: WeightGradQueue) -> MicrobatchContext:
        return MicrobatchContext(
            num_sequences=self.config.train.microbatch_size,
            gradients=self.gradients,
            weight_grads=queue,
            statistics=Statistics(),
            balance_loss_scale=1.0,
            saved=KeepEverything() if saved is None else saved,
        )

    def drain(self, queue: WeightGradQueue) -> None:
        """The weight gradients that the backward has put off."""
        queue.drain((0, 0), self.gradients)

    def store(self) -> Any:
        """An activation store for the config's policies; None where everything is kept."""
        return build_activations(build_program(self.config), 0, build_device(self.device))


def new_queue() -> WeightGradQueue:
    return WeightGradQueue()


def build_layer(config: Config, layers: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Layer:
    """Layers of a model without its ends, with random weights made on the device."""
    return Layer(config, _part(config, layers, False, False, device, dtype), device, PlainGradients())


def with_config(layer: Layer, config: Config) -> Layer:
    """The same weights under another config, for example other activation policies."""
    return dataclasses.replace(layer, config=config)


def forward_phase(phase: Phase, inputs: Tensors, context: MicrobatchContext) -> tuple[Tensors, Any]:
    return phase.forward(inputs, context)


def _part(
    config: Config,
    layers: tuple[int, ...],
    embedding: bool,
    head: bool,
    device: torch.device,
    dtype: torch.dtype,
) -> Model:
    part = ModelPart(layers, embedding, head, tuple(range(config.model.n_routed_experts)))
    model = build_model(config.model, part, dtype, device, backend=backend(config, device))
    for piece in model.pieces():
        # The model's own initial values come from the host, one weight after another, which takes
        # too long here.
        if piece.trained and piece.tensor.dim() == 1:
            piece.tensor.fill_(1.0)
        elif piece.trained:
            piece.tensor.normal_(std=config.model.initializer_range)
    return model


# A schedule on one rank.


class ScheduledPass:
    """One pass over a config's action list on one rank: forwards, backwards, weight gradients,
    offload and reload."""

    def __init__(
        self,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        gradients: PlainGradients,
        models: dict[int, Model] | None = None,
    ) -> None:
        program = build_program(config)
        self.schedule = program.schedule
        pieces = enumerate(program.layout.virtual_stages)
        self.models = models or {
            index: _part(config, tuple(piece.layers), piece.embedding, piece.head, device, dtype)
            for index, piece in pieces
        }
        self.config, self.device = config, device
        self.store = build_activations(program, 0, build_device(device))
        self.stage = PipelineStage(
            self.models, build_routes(self.schedule, 0), None, gradients, build_device(device)
        )
        self.gradients = gradients

    def run(self, batch: torch.Tensor) -> float:
        """Work on (n, S + 1) sequences; the loss."""
        found = Statistics()
        with self.stage.step(self._inputs(batch, found)):
            run_actions(self.schedule.stages[0], self.stage)
        assert found.loss is not None
        return float(found.loss.item())

    def offloaded_bytes(self) -> int:
        """Copied to the host since it was last asked."""
        return host_traffic(self.store).get("offloaded_bytes", 0)

    def _inputs(self, batch: torch.Tensor, found: Statistics) -> StepInputs:
        train = self.config.train
        microbatches = batch.split(train.microbatch_size)

        def make_context(virtual_stage: int, microbatch: int) -> MicrobatchContext:
            store = self.store
            saved: SavedActivations = KeepEverything() if store is None else store.microbatch()
            return MicrobatchContext(
                num_sequences=train.microbatch_size,
                gradients=self.gradients,
                weight_grads=self.stage.queue,
                key=(virtual_stage, microbatch),
                statistics=found,
                saved=saved,
                loss=CrossEntropy(microbatches[microbatch][:, 1:], 1 / train.global_batch_tokens),
            )

        return StepInputs(
            lambda m: microbatches[m][:, :-1],
            train.microbatch_size * train.seq_len,
            make_context,
            len(microbatches),
        )


# Training.


class TextCorpus:
    """The standard library's sources on this machine as bytes, in the place of a run's corpus: no
    dataset is built."""

    def __init__(self, seq_len: int, num_tokens: int) -> None:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        text = b"".join(file.read_bytes() for file in files)[:num_tokens]
        self._tokens, self._seq_len = torch.frombuffer(bytearray(text), dtype=torch.uint8).long(), seq_len

    def batch(self, split: str, start: int, count: int) -> torch.Tensor:
        """Windows start .. start + count, again from the front where the text ends: (count, seq_len
        + 1)."""
        places = len(self._tokens) // (self._seq_len + 1)
        windows = self._tokens[: places * (self._seq_len + 1)].view(places, self._seq_len + 1)
        return windows[torch.arange(start, start + count) % places]


def train_steps(
    config: Config,
    device: torch.device,
    before_steps: Callable[[Run], None],
    after_step: Callable[[StepMetrics], None],
) -> None:
    """Build a run of one rank and take its steps with the trainer's own `train_step`."""
    program = build_program(config)
    layout = program.layout
    corpus: Any = TextCorpus(
        config.train.seq_len, config.train.steps * config.train.global_batch_tokens + 2**20
    )

    def run_rank(world: Any) -> None:
        groups = build_groups(layout.grid, world, layout.relay_ranks)
        run = build_run(program, corpus, groups, build_device(world.device))
        before_steps(run)
        for index in range(config.train.steps):
            after_step(train_step(run, read_batch(run, index)))
        run.optimizer.finish_gather()

    run_world("single", 1, device, config.train, run_rank)
