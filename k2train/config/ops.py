"""`ops`: whose kernels compute, and in which cases.

Program and plan both ask `attention_kernel`, the one owner of that rule.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from k2train.config.errors import ConfigError
from k2train.config.fields import check_ranges, key

Backend = Literal["auto", "torch", "triton", "te"]
AttentionKernel = Literal["cudnn", "triton", "te", "tiles"]

HOPPER = (9, 0)
"""The compute capability of the GPUs that a plan is made for."""


@dataclasses.dataclass(frozen=True)
class OpsConfig:
    """`ops`: whose kernels compute attention on a GPU, and with te the experts' products."""

    backend: Backend = key(
        "auto takes cuDNN's attention where it can, else this program's Triton kernels, else stock operations; torch takes "
        "no Triton for attention; triton has sums in a fixed order, so that two runs give the same bits; te is Transformer "
        "Engine for attention and for the experts' products, which must be installed",
        default="auto",
    )
    exact_max_logits: bool = key(
        "with cuDNN's attention, find every head's largest logit exactly; by default a head whose logits are known to be at "
        "most optim.qk_clip_tau, so that nothing is clipped, reports an upper bound",
        default=False,
    )

    def __post_init__(self) -> None:
        check_ranges("ops", self)


DEFAULT_OPS = OpsConfig()


@dataclasses.dataclass(frozen=True)
class AttentionSite:
    """What decides which kernels attention can take.

    query_width, value_width: features of a head. capability: of the GPU. cudnn, triton, te: whether
    torch's cuDNN says that it takes these widths, Triton is installed, Transformer Engine is
    installed; a plan takes it that they are.
    """

    on_gpu: bool
    dtype: str
    query_width: int
    value_width: int
    capability: tuple[int, int] = HOPPER
    cudnn: bool = True
    triton: bool = True
    te: bool = True


def exact_above(ops: OpsConfig, tau: float | None) -> float:
    """The logit from which the largest of a head must be exact: QK-Clip's tau, from where it would
    be clipped.

    Nothing else that a run computes depends on the largest logits. Minus infinity where they are
    wanted exactly, infinity where nothing is clipped.
    """
    if ops.exact_max_logits:
        return -math.inf
    return math.inf if tau is None else tau


def attention_words(kernel: AttentionKernel, exact_above: float, triton: bool = True) -> str:
    """What attention takes, for people.

    triton: whether the largest logits beside cuDNN's attention are Triton's.
    """
    if kernel == "triton":
        return "Triton kernels; largest logits exact"
    if kernel == "te":
        return "Transformer Engine; largest logits exact"
    if kernel == "tiles":
        return "stock operations, a tile of scores at a time; largest logits exact"
    if not triton:
        return "cuDNN; largest logits by stock operations, exact"
    if exact_above == -math.inf:
        return "cuDNN; largest logits exact"
    if exact_above == math.inf:
        return "cuDNN; of largest logits an upper bound"
    return f"cuDNN; largest logits exact above {exact_above:g}, else an upper bound"


_IN_ORDER: dict[Backend, tuple[AttentionKernel, ...]] = {
    "auto": ("cudnn", "triton", "tiles"),
    "torch": ("cudnn", "tiles"),
    "triton": ("triton",),
    "te": ("te",),
}
_MAX_TRITON_WIDTH = 256
_REMEDY = "set ops.backend=auto, which takes the fastest that can run"


def attention_kernel(backend: Backend, site: AttentionSite) -> AttentionKernel:
    """The first kernel of the backend that can run.

    Raises ConfigError for a backend of which none can.
    """
    kernels = _IN_ORDER[backend]
    for kernel in kernels:
        if obstacle(kernel, site) is None:
            return kernel
    raise ConfigError("ops.backend", backend, f"cannot run here: {obstacle(kernels[0], site)}", _REMEDY)


def obstacle(kernel: AttentionKernel, site: AttentionSite) -> str | None:
    """Why a kernel cannot run, as a sentence fragment; None where it can."""
    if kernel == "tiles":
        return None
    if not site.on_gpu:
        return "it needs a CUDA device (train.device)"
    if site.dtype not in ("bfloat16", "float16"):
        return f"it multiplies 16-bit numbers, and train.dtype is {site.dtype}"
    if kernel == "cudnn":
        return _cudnn_obstacle(site)
    if kernel == "te":
        return None if site.te else "transformer-engine is not installed (pip install 'k2train[gpu]')"
    if max(site.query_width, site.value_width) > _MAX_TRITON_WIDTH:
        return f"its heads have at most {_MAX_TRITON_WIDTH} features"
    if site.capability < (8, 0):
        return "it needs a GPU of compute capability 8.0 or newer"
    return None if site.triton else "triton is not installed (pip install 'k2train[gpu]')"


def _cudnn_obstacle(site: AttentionSite) -> str | None:
    """Forward and backward, from cuDNN 9.11 on: what torch 2.13's `can_use_cudnn_attention` asks
    for.
    """
    widths = (site.query_width, site.value_width)
    if site.capability[0] not in (9, 10):
        return "cuDNN's attention is fast on Hopper and Blackwell alone"
    if widths != (192, 128) and (max(widths) > 128 or any(width % 8 for width in widths)):
        return "cuDNN's attention takes heads of 192 and 128 features, or of multiples of 8 up to 128"
    return None if site.cudnn else "torch says that its cuDNN does not take this attention"
