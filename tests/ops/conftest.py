"""What several files of tests share, handed to tests as functions.

Of FP8 storage: a loop over tiles, and the error bound. Of Triton kernels: running a file's tests
under the interpreter, which has to be chosen before triton is imported, and compiling a kernel for
a GPU that is not here.

Letters: R rows, W numbers of a row, N tiles of a row.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
TILE = 128
# Of one program on an H100 or H800.
SHARED_MEMORY_BYTES = 227 * 1024
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _looped(x_RW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (R, W) uint8 and scales (R, N) FP32 of finite rows: torch's own cast, one tile after
    the other."""
    codes_RW = torch.empty(x_RW.shape, dtype=torch.uint8)
    scales = []
    for row in range(x_RW.shape[0]):
        for start in range(0, x_RW.shape[1], TILE):
            tile = x_RW[row, start : start + TILE].float()
            scale = (tile.abs().max() / 448).clamp(min=2.0**-126)
            scales.append(scale)
            scaled = (tile / scale).clamp(-448, 448)
            codes_RW[row, start : start + TILE] = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes_RW, torch.tensor(scales).view(x_RW.shape[0], -(-x_RW.shape[1] // TILE))


def _spread(scales_RN: torch.Tensor, width: int) -> torch.Tensor:
    """The scale of every element (R, W)."""
    return scales_RN.repeat_interleave(TILE, dim=1)[:, :width]


def _bound(x_RW: torch.Tensor, scales_RN: torch.Tensor) -> torch.Tensor:
    """The largest error of each element (R, W), float64.

    E4M3 has 3 fraction bits: a number in [2^e, 2^(e+1)), e >= -6, is at most half of 2^(e-3) away
    from the nearest code, which is 2^-4 of it at most. Below 2^-6 codes are 2^-9 apart, half of it
    2^-10, times the scale. Three FP32 roundings (a float64's, the division's, the product's) move
    the value, at most 2 |x| or 2^-6 scales where it matters, by 2^-24 of it each; 2^-18 of the
    bound covers them. The cast back to a dtype with machine epsilon eps adds eps / 2 of the value,
    and below the dtype's normal numbers half its smallest subnormal (FP32's for float64, whose
    product is FP32 too).
    """
    size_RW = x_RW.double().abs()
    steps_RW = _spread(scales_RN, x_RW.shape[1]).double() * 2.0**-10
    error_RW = torch.maximum(size_RW * 2.0**-4, steps_RW) * (1 + 2.0**-18)
    info = torch.finfo(torch.float32 if x_RW.dtype == torch.float64 else x_RW.dtype)
    return error_RW + (size_RW + error_RW) * info.eps / 2 + info.tiny * info.eps / 2


@pytest.fixture(scope="session")
def looped() -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    return _looped


@pytest.fixture(scope="session")
def spread() -> Callable[[torch.Tensor, int], torch.Tensor]:
    return _spread


@pytest.fixture(scope="session")
def bound() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return _bound


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests called interpreted are for the process that `_pass_under_the_interpreter` starts, and
    are all it runs."""
    if INTERPRETED:
        return
    elsewhere = [item for item in items if item.name.startswith("test_interpreted")]
    if elsewhere:
        config.hook.pytest_deselected(items=elsewhere)
        items[:] = [item for item in items if not item.name.startswith("test_interpreted")]


def _pass_under_the_interpreter(file: str, at_least: int) -> None:
    if INTERPRETED:
        pytest.skip("this is that process")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "interpreted", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, done.stdout
    assert int(passed[1]) >= at_least
    assert "skipped" not in done.stdout


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A kernel's machine code. registers: of a thread; spilled: bytes of a thread's stack; shared:
    bytes of a program."""

    ptx: str
    registers: int
    spilled: int
    shared: int


def _compile_for_h100(
    kernel: Any, arguments: Mapping[str, str | int], constants: Mapping[str, Any], **options: Any
) -> Compiled:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types, attributes, fixed = {}, {}, dict(constants)
    for name, argument in arguments.items():
        if argument == 1:
            fixed[name] = 1
            continue
        types[name] = "i32" if isinstance(argument, int) else argument
        if argument % 16 == 0 if isinstance(argument, int) else argument.startswith("*"):
            attributes[(kernel.arg_names.index(name),)] = [["tt.divisibility", 16]]
    types.update(dict.fromkeys(fixed, "constexpr"))
    signature = {name: types[name] for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.shared <= SHARED_MEMORY_BYTES
    return Compiled(compiled.asm["ptx"], *_resources(compiled.asm["cubin"]), compiled.metadata.shared)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as NVIDIA's own tool reads them from the machine
    code."""
    from triton.backends import nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, printed
    return int(found[1]), int(found[2])


@pytest.fixture(scope="session")
def pass_under_the_interpreter() -> Callable[[str, int], None]:
    """Run the tests of a file that are called interpreted in a process with TRITON_INTERPRET=1; so
    many must pass."""
    return _pass_under_the_interpreter


@pytest.fixture(scope="session")
def compile_for_h100() -> Callable[..., Any]:
    """Compile a kernel for an H100 down to machine code, with triton's own assembler: no GPU is
    needed.

    arguments: of a tensor or a float Triton's name of its type, of an integer its value. As in a
    launch, tensors begin at multiples of 16 bytes, and an integer is known to be a multiple of 16
    or to be 1 where it is: the binary is the one that runs. constants: constexpr arguments;
    options: the launch's.
    """
    if INTERPRETED or importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton's compiler")
    return _compile_for_h100


def _host_attention(
    q, k, v, bias, with_sums, dropout: float = 0.0, causal: bool = False, with_mask: bool = False, scale=None
):
    """What cuDNN's forward returns, from stock operations in float64."""
    assert (bias, with_sums, dropout, causal, with_mask) == (None, True, 0.0, True, False)
    logits = (q.double() @ k.double().transpose(2, 3)) * scale
    logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), float("-inf"))
    sums = logits.logsumexp(-1, keepdim=True)
    # As cuDNN's does, the output lies in memory as the queries do.
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    if q.transpose(1, 2).is_contiguous():
        out = q.transpose(1, 2).new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1]).transpose(1, 2)
    out.copy_((logits - sums).exp() @ v.double())
    length, state = q.shape[2], torch.zeros((), dtype=torch.int64)
    nothing = torch.empty(0)
    return out, sums.float(), nothing, nothing, length, length, state, state, nothing


def _host_attention_backward(
    dout, q, k, v, out, sums, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, scale=None
):
    """The gradients, with nothing but what cuDNN's backward is given: no graph of the forward."""
    assert (dropout, causal, max_q, max_k) == (0.0, True, q.shape[2], k.shape[2])
    logits = (q.double() @ k.double().transpose(2, 3)) * scale
    logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), float("-inf"))
    p = (logits - sums).exp()
    dp = dout.double() @ v.double().transpose(2, 3)
    ds = p * (dp - (out.double() * dout.double()).sum(-1, keepdim=True)) * scale
    gradients = (ds @ k.double(), ds.transpose(2, 3) @ q.double(), p.transpose(2, 3) @ dout.double())
    return tuple(torch.empty_like(t).copy_(g) for t, g in zip((q, k, v), gradients, strict=True))


@pytest.fixture
def cudnn_on_the_host() -> Iterator[None]:
    """torch's two cuDNN operations for tensors of the host, which have none, while a test runs."""
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_cudnn_attention", _host_attention, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", _host_attention_backward, "CPU")
    yield
    library._destroy()
