"""A whole model on the Triton kernels of attention, SwiGLU and RMSNorm, under the interpreter.

Tests called interpreted run in a process of their own, which one test starts (conftest).
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util

import pytest
import torch

from k2train.activations.arena import HostArena
from k2train.activations.offload import OffloadEngine
from k2train.activations.store import ActivationStore
from k2train.config.compose import load_config
from k2train.device.cpu import CpuDevice
from k2train.model.context import MicrobatchContext
from k2train.model.loss import CrossEntropy
from k2train.model.model import backward, build_model, forward
from k2train.model.pieces import whole_model
from k2train.ops import attention, attention_cudnn, norm, swiglu
from k2train.ops.backend import OpsBackend
from k2train.ops.weight_grad import PlainGradients

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def test_the_model_passes_its_tests_under_the_interpreter(pass_under_the_interpreter) -> None:
    pass_under_the_interpreter(__file__, 10)


@pytest.mark.parametrize("kernel", ["triton", "cudnn"])
@pytest.mark.parametrize(
    "policies",
    ["none", "recompute", "recompute activations.attention_output=recompute", "offload", "recompute_offload"],
)
def test_interpreted_kernels_in_a_model_give_its_gradients_and_save_what_has_a_name(
    policies: str, kernel: str, monkeypatch: pytest.MonkeyPatch, cudnn_on_the_host
) -> None:
    """A whole model in FP16 with the store of activations, which refuses a saved tensor without a
    name: the loss and every gradient are those of a run that keeps everything to the bit, and about
    those of stock operations."""
    config = load_config(["experiment=tiny", *f"activations={policies}".split()])
    tiny = dataclasses.replace(config.model, num_hidden_layers=2)
    tokens = torch.randint(tiny.vocab_size, (1, 40), generator=torch.Generator().manual_seed(0))

    def run(store: ActivationStore | None, backend: OpsBackend) -> dict[str, torch.Tensor]:
        model = build_model(tiny, whole_model(tiny), dtype=torch.float16, backend=backend)
        model.initialise(0)
        sink = PlainGradients()
        context = MicrobatchContext(1, sink, loss=CrossEntropy(tokens.roll(-1, 1), 1 / tokens.numel()))
        if store is not None:
            context.saved = store.microbatch()
        (loss,), records = forward(model, (tokens,), context)
        if store is not None and config.activations.offloads:
            context.saved.offload()
            context.saved.reload()
        backward(model, records, (None,), context)
        gradients = {
            piece.name: piece.view(sink.buffer(piece.parameter)) for piece in model.pieces() if piece.trained
        }
        return {"loss": loss, **gradients}

    stock = run(None, OpsBackend())
    taken = set()

    def kernels(module: str, device: torch.device):
        taken.add(module)
        return importlib.import_module(f"k2train.ops.{module}")

    for user in (attention, attention_cudnn, norm, swiglu):
        monkeypatch.setattr(user, "gpu_kernels", kernels)
    triton = OpsBackend(kernel, triton=True)
    plain = run(None, triton)
    engine = OffloadEngine(CpuDevice(), HostArena(CpuDevice()))
    stored = run(ActivationStore(config.activations, engine), triton)
    for name, tensor in plain.items():
        assert torch.equal(stored[name], tensor), name
        assert (tensor - stock[name]).abs().max() <= 0.05 * stock[name].abs().max() + 1e-5, name
    assert not all(torch.equal(tensor, stock[name]) for name, tensor in plain.items())
    ours = {"triton": "attention_triton", "cudnn": "row_max_triton"}[kernel]
    assert taken == {ours, "norm_triton", "swiglu_triton"}
