"""The root of a config: one frozen dataclass a section.

Nothing here is derived; layout and plan hold derived values.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from k2train.config.data import DataConfig
from k2train.config.errors import ConfigError
from k2train.config.fields import key
from k2train.config.model import ModelConfig
from k2train.config.ops import OpsConfig
from k2train.config.optim import OptimConfig
from k2train.config.sections import (
    ActivationsConfig,
    ClusterConfig,
    LayoutConfig,
    PlanConfig,
    RehearseConfig,
    ScheduleConfig,
    TelemetryConfig,
    TrainConfig,
)

World = Literal["auto", "single", "threads", "processes"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything `train`, `plan` and `report` read."""

    name: str = key("name of the run, the first part of its directory")
    model: ModelConfig = key("architecture")
    layout: LayoutConfig = key("who is where")
    schedule: ScheduleConfig = key("in which order")
    activations: ActivationsConfig = key("what is kept between forward and backward")
    optim: OptimConfig = key("the update")
    data: DataConfig = key("the corpora")
    cluster: ClusterConfig = key("the machine")
    train: TrainConfig = key("the step and the run")
    ops: OpsConfig = key("whose kernels compute on a GPU", factory=OpsConfig)
    telemetry: TelemetryConfig = key("where metrics go", factory=TelemetryConfig)
    plan: PlanConfig = key("files of `k2train plan`", factory=PlanConfig)
    rehearse: RehearseConfig = key("the rank of `k2train rehearse`", factory=RehearseConfig)
    world: World = key(
        "how ranks run: one process each (a launcher's, else started here), threads of one process, or a single rank",
        default="auto",
    )
    run_dir: str | None = key(
        "directory of the run; one that holds a checkpoint is resumed; null makes a new one", default=None
    )

    def __post_init__(self) -> None:
        check_sequence(self)
        check_batch(self)
        check_experts_fit(self.model, self.layout.ep)


def check_batch(config: Config) -> None:
    """The global batch is fixed in tokens, so it must be whole sequences and whole microbatches.

    Whether the ranks can share them is the layout's check, but what is proposed here passes that,
    too. A rehearsal that sets its microbatches makes the batch from them.
    """
    train = config.train
    if (
        train.global_batch_tokens % (train.seq_len * train.microbatch_size)
        and config.rehearse.microbatches is None
    ):
        raise batch_error(train, config.layout.known_data_ranks(config.cluster.gpus_per_node))


def batch_error(train: TrainConfig, ranks: int) -> ConfigError:
    """What is wrong with a global batch that `ranks` data-parallel ranks cannot share.

    ranks: 1 names none.
    """
    tokens = train.seq_len * train.microbatch_size * ranks
    below = train.global_batch_tokens // tokens * tokens
    product, numbers = "train.seq_len * train.microbatch_size", f"{train.seq_len} * {train.microbatch_size}"
    if ranks > 1:
        product, numbers = f"{product} * data-parallel ranks", f"{numbers} * {ranks}"
    near = f"nearest are {below} and {below + tokens}" if below else f"nearest is {tokens}"
    rule = f"must be a multiple of {product} = {numbers} = {tokens} tokens"
    remedy = f"{near}; or change train.seq_len={train.seq_len}, train.microbatch_size={train.microbatch_size}"
    if ranks > 1:
        remedy += ", layout.nodes or layout.edp"
    return ConfigError("train.global_batch_tokens", train.global_batch_tokens, rule, remedy)


def check_experts_fit(model: ModelConfig, ep: int) -> None:
    """Every expert-parallel rank holds the same number of whole experts. Raises ConfigError."""
    experts = model.n_routed_experts
    if model.num_moe_layers and experts % ep:
        divisors = [n for n in range(1, experts + 1) if experts % n == 0]
        close = sorted(divisors, key=lambda n: abs(n - ep))[:2]
        raise ConfigError(
            "layout.ep",
            ep,
            f"must divide model.n_routed_experts={experts}",
            f"nearest are {' and '.join(map(str, sorted(close)))}",
        )


def check_sequence(config: Config) -> None:
    """A sequence longer than the rotary embedding was made for trains nonsense silently."""
    limit = config.model.max_position_embeddings
    if config.train.seq_len > limit:
        raise ConfigError(
            "train.seq_len",
            config.train.seq_len,
            f"exceeds model.max_position_embeddings={limit}",
            "lower it, or raise model.max_position_embeddings (with model.rope_scaling for YaRN)",
        )
