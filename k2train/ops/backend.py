"""Which kernels a run's operations take: chosen once, when a run is built, and handed to what
computes.

Letters: B sequences, H heads, S positions, K query and key features.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math

import torch

from k2train.architecture.heads import Heads
from k2train.architecture.layer import mixer_of
from k2train.config.model import ModelConfig
from k2train.config.ops import (
    AttentionKernel,
    AttentionSite,
    OpsConfig,
    attention_kernel,
    attention_words,
    exact_above,
)
from k2train.config.sections import Dtype
from k2train.device.build import compute_capability
from k2train.ops.attention_cudnn import cudnn_takes
from k2train.ops.dtypes import DTYPES
from k2train.ops.grouped import GroupedProduct, grouped_mm
from k2train.ops.rotary import softmax_scale
from k2train.ops.te_attention import TeAttention, build_te_attention
from k2train.ops.te_grouped import build_te_grouped

# Positions of the tensors that cuDNN is asked about: it refuses one alone, and no other number
# matters to it.
_PROBE_LENGTH = 128


@dataclasses.dataclass(frozen=True)
class OpsBackend:
    """The choice. attention: whose kernel. exact_above: beside cuDNN's, the logit up to which an
    upper bound will do.

    triton: whether the largest logits beside cuDNN's attention may be Triton's. te: there with
    attention "te" alone. grouped: whose kernels compute the experts' two products y and dx.
    """

    attention: AttentionKernel = "tiles"
    exact_above: float = -math.inf
    triton: bool = False
    te: TeAttention | None = None
    grouped: GroupedProduct = grouped_mm

    @property
    def heads_inside(self) -> bool:
        """Whether queries, keys and values lie as (B, S, H, features), so that the output does
        without a copy."""
        return self.attention in ("cudnn", "te")

    @property
    def words(self) -> str:
        """For people, at the start of a run."""
        return attention_words(self.attention, self.exact_above, self.triton)


def choose_backend(
    ops: OpsConfig, model: ModelConfig, dtype: Dtype, tau: float | None, device: torch.device
) -> OpsBackend:
    """What `ops` asks for, on this device. Raises ConfigError for a backend asked for by name that
    cannot run.

    tau: QK-Clip's limit, None where it is off. A device of type CUDA where torch finds none is a
    rehearsal's: what cuDNN takes on a Hopper GPU is taken there.
    """
    kernel = attention_kernel(ops.backend, _site(model, dtype, device))
    triton = ops.backend != "torch" and _installed("triton")
    if kernel != "te":
        return OpsBackend(kernel, exact_above(ops, tau), triton)
    heads = mixer_of(model).heads
    te = build_te_attention(heads.num, heads.query, heads.value, softmax_scale(model))
    return OpsBackend(kernel, exact_above(ops, tau), triton, te, build_te_grouped())


def _site(model: ModelConfig, dtype: Dtype, device: torch.device) -> AttentionSite:
    on_gpu, heads = device.type == "cuda", mixer_of(model).heads
    return AttentionSite(
        on_gpu,
        dtype,
        heads.query,
        heads.value,
        compute_capability(device) if on_gpu else (0, 0),
        cudnn=on_gpu and _cudnn_takes(heads, DTYPES[dtype], device),
        triton=_installed("triton"),
        te=_installed("transformer_engine"),
    )


def _cudnn_takes(heads: Heads, dtype: torch.dtype, device: torch.device) -> bool:
    if not torch.cuda.is_available():
        return True
    shape = (1, _PROBE_LENGTH, heads.num)
    make = functools.partial(torch.empty, dtype=dtype, device=device, requires_grad=True)
    q_BHSK, k_BHSK = (make(*shape, heads.query).transpose(1, 2) for _ in range(2))
    return cudnn_takes(q_BHSK, k_BHSK, make(*shape, heads.value).transpose(1, 2))


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
