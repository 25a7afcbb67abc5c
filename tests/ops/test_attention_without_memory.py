"""Attention of K2's size with tensors that have no memory, as a rehearsal runs it: in a process of
its own, since the stub that lets torch know a device must be loaded before torch."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys

import pytest

SCRIPT = '''
import sys
from k2train.rehearsal.stub import load_stub

load_stub()
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from k2train.config.compose import load_config
from k2train.model.context import MicrobatchContext
from k2train.model.layers import AttentionPhase
from k2train.architecture.layer import layer_of
from k2train.model.attention import LayerTools, Rotary
from k2train.model.pieces import Allocator
from k2train.ops.attention_tiles import AttentionScratch
from k2train.ops.backend import choose_backend
from k2train.ops.weight_grad import PlainGradients


class Ours(TorchDispatchMode):
    """Counts this program's operations."""

    def __init__(self):
        super().__init__()
        self.called = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace == "k2train":
            name = function.overloadpacket.__name__
            self.called[name] = self.called.get(name, 0) + 1
        return function(*arguments, **(keywords or {}))


config = load_config(["experiment=k2", f"ops.backend={sys.argv[1]}"])
device = torch.device("cuda:0")
backend = choose_backend(config.ops, config.model, "bfloat16", config.optim.tau, device)
# As rehearsal.run does, and for its reason.
multithreading = torch.autograd.set_multithreading_enabled(False)
with multithreading, FakeTensorMode(allow_non_fake_inputs=True), Ours() as ours:
    allocator = Allocator(torch.bfloat16, device)
    tools = LayerTools(config.model, Rotary(config.model, allocator), AttentionScratch(), backend, allocator)
    phase = AttentionPhase(layer_of(config.model, "dense"), 0, tools)
    context = MicrobatchContext(1, PlainGradients())
    x = torch.empty(4096, 7168, dtype=torch.bfloat16, device=device)
    (out,), record = phase.forward((x,), context)
    (dx,) = phase.backward(record, (torch.empty_like(out),), context)
    assert dx.shape == x.shape and dx.device == device
    assert context.statistics.max_logits[0].shape == (64,)
print(backend.attention, *(f"{name}={count}" for name, count in sorted(ours.called.items()) if "attention" in name))
'''


@pytest.mark.skipif(shutil.which("g++") is None, reason="the stub needs a C++ compiler once")
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    ("backend", "taken"),
    [
        (
            "auto",
            "cudnn attention_best_blocks=1 attention_other_blocks=1 cudnn_attention=1 cudnn_attention_backward=1",
        ),
        (
            "triton",
            "triton attention_forward=1 attention_key_gradients=1 attention_output_products=1 attention_row_gradients=1",
        ),
    ],
)
def test_a_layer_of_k2s_size_goes_through_the_backends_own_operations(backend: str, taken: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, backend], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == taken
