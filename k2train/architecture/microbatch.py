"""From the config's sections to the microbatch that a layer works on."""

from __future__ import annotations

from k2train.architecture.layer import mixer_of
from k2train.architecture.work import Workload
from k2train.config.model import ModelConfig
from k2train.config.ops import DEFAULT_OPS, AttentionSite, OpsConfig, attention_kernel
from k2train.config.sections import TrainConfig


def workload(
    model: ModelConfig,
    train: TrainConfig,
    ep: int,
    relay_ranks: int | None = None,
    ops: OpsConfig = DEFAULT_OPS,
    deepep: bool = False,
) -> Workload:
    """The microbatch that `train` asks for.

    deepep: whether the layout leaves the exchange to DeepEP. Raises ConfigError for an
    `ops.backend` that cannot run there.
    """
    balance_loss = train.balance_loss_alpha > 0
    on_gpu = train.device != "cpu" and train.dtype == "bfloat16"
    heads = mixer_of(model).heads
    site = AttentionSite(on_gpu, train.dtype, heads.query, heads.value)
    return Workload(
        model,
        train.seq_len,
        train.microbatch_size,
        train.dtype,
        ep,
        balance_loss,
        attention_kernel(ops.backend, site),
        ops.exact_max_logits,
        relay_ranks,
        deepep and ep > 1,
    )
