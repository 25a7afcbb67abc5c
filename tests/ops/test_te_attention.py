"""Transformer Engine's attention behind `ops.backend=te`, with a stand-in that has its documented
signature.

It has run on no GPU: what is shown is that its arguments are right, and what becomes of what it
returns and saves.
"""

from __future__ import annotations

import dataclasses
import math
import types
import weakref

import pytest
import torch

from k2train.activations.arena import HostArena
from k2train.activations.offload import OffloadEngine
from k2train.activations.store import ActivationStore
from k2train.architecture.layer import mixer_of
from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.device.cpu import CpuDevice
from k2train.model.context import MicrobatchContext
from k2train.model.loss import CrossEntropy
from k2train.model.model import backward, build_model, forward
from k2train.model.pieces import whole_model
from k2train.ops.attention import causal_attention, causal_attention_reference
from k2train.ops.backend import OpsBackend
from k2train.ops.rotary import softmax_scale
from k2train.ops.te_attention import TeAttention, build_te_attention, dot_product_attention
from k2train.ops.weight_grad import PlainGradients


class FusedAttnFunc(torch.autograd.Function):
    """As Transformer Engine's: saves its inputs, its output and tensors of its own, and returns the
    largest logits."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        heads_first = [t.transpose(1, 2) for t in (q, k, v)]
        out, max_logit = causal_attention_reference(*heads_first, scale)
        softmax_statistics, rng_state = torch.ones(q.shape[2]), torch.zeros(2, dtype=torch.int64)
        out = out.contiguous()
        ctx.save_for_backward(q, k, v, out, softmax_statistics, rng_state)
        ctx.scale = scale
        ctx.mark_non_differentiable(max_logit)
        return out, max_logit

    @staticmethod
    def backward(ctx, dout, _):
        q, k, v, out, statistics, rng_state = ctx.saved_tensors
        assert statistics.eq(1).all()
        assert rng_state.eq(0).all()
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (q, k, v)]
            again, _ = causal_attention_reference(*(t.transpose(1, 2) for t in leaves), ctx.scale)
        torch.testing.assert_close(again, out)
        return *torch.autograd.grad(again, leaves, dout), None


class DotProductAttention:
    """`transformer_engine.pytorch.DotProductAttention`, of its documented arguments those that are
    used."""

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups=None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size=None,
        softmax_scale=None,
        return_max_logit: bool = False,
    ) -> None:
        assert (attention_dropout, qkv_format, attn_mask_type) == (0.0, "bshd", "causal")
        assert return_max_logit is True
        assert window_size is None
        assert num_gqa_groups is None
        self.heads, self.widths, self.scale = num_attention_heads, kv_channels, softmax_scale

    def __call__(self, query_layer, key_layer, value_layer):
        for tensor, width in zip((query_layer, key_layer, value_layer), (0, 0, 1), strict=True):
            assert tensor.is_contiguous()
            assert tensor.shape[2:] == (self.heads, self.widths[width])
        out, max_logit = FusedAttnFunc.apply(query_layer, key_layer, value_layer, self.scale)
        return out.flatten(2), max_logit


TE = types.SimpleNamespace(DotProductAttention=DotProductAttention)


def backend() -> OpsBackend:
    return OpsBackend("te", te=TeAttention(dot_product_attention(TE, 3, 12, 8, 0.3)))


def inputs():
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 9, 3, width, generator=generator, dtype=torch.float64).requires_grad_()
        for width in (12, 12, 8)
    ]


def attend(tensors):
    return causal_attention(*(t.transpose(1, 2) for t in tensors), 0.3, backend=backend())


def test_output_largest_logits_and_gradients_are_those_of_full_scores() -> None:
    tensors = inputs()
    out, maxima, _ = attend(tensors)
    expected, expected_maxima = causal_attention_reference(*(t.transpose(1, 2) for t in tensors), 0.3)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(maxima, expected_maxima.float())
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, tensors, dout)
    for one, other in zip(got, torch.autograd.grad(expected, tensors, dout), strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        plain = attend(tensors)
    torch.testing.assert_close(plain.out, out)
    assert plain.extras == ()


def test_what_it_saves_of_its_own_is_handed_out_to_be_named_and_saved_by_one_node() -> None:
    tensors, saved = inputs(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out, _, extras = attend(tensors)
    assert [tuple(t.shape) for t in extras] == [(3,), (2,)]
    known = {t.untyped_storage().data_ptr() for t in (*tensors, out, *extras)}
    assert {t.untyped_storage().data_ptr() for t in saved} == known


def test_no_tensor_is_held_beside_what_hooks_keep() -> None:
    """With hooks that keep numbers in place of tensors, nothing else keeps queries, keys and values
    alive."""
    kept: list[torch.Tensor] = []
    tensors = [t.detach().clone().requires_grad_() for t in inputs()]
    hidden = [t * 1.0 for t in tensors]  # not leaves, as a layer's queries are not
    alive = [weakref.ref(t.untyped_storage()) for t in hidden]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.clone()) or len(kept) - 1, lambda index: kept[index]
    ):
        out, _, extras = attend(hidden)
    want = [t.clone() for t in hidden]
    del hidden, extras
    assert all(storage() is None for storage in alive)
    got = torch.autograd.grad(out, tensors, torch.ones_like(out))
    leaves = [t.detach().requires_grad_() for t in want]
    expected, _ = causal_attention_reference(*(t.transpose(1, 2) for t in leaves), 0.3)
    for one, other in zip(got, torch.autograd.grad(expected.sum(), leaves), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("policies", ["none", "offload", "recompute", "recompute_offload"])
def test_in_a_model_the_store_of_activations_finds_a_name_for_all_it_saves(policies: str) -> None:
    """Gradients are those of a run that keeps everything, to the bit, and nothing is refused for
    want of a name."""
    config = load_config(["experiment=tiny", f"activations={policies}"])
    tiny = dataclasses.replace(config.model, num_hidden_layers=2)
    attend = dot_product_attention(TE, *dataclasses.astuple(mixer_of(tiny).heads)[:3], softmax_scale(tiny))
    chosen = OpsBackend("te", te=TeAttention(attend))
    tokens = torch.randint(tiny.vocab_size, (1, 20), generator=torch.Generator().manual_seed(0))

    def run(store: ActivationStore | None) -> list[torch.Tensor]:
        model = build_model(tiny, whole_model(tiny), torch.float64, backend=chosen)
        model.initialise(0)
        sink = PlainGradients()
        context = MicrobatchContext(1, sink, loss=CrossEntropy(tokens.roll(-1, 1), 0.05))
        if store is not None:
            context.saved = store.microbatch()
        (loss,), records = forward(model, (tokens,), context)
        if store is not None and config.activations.offloads:
            context.saved.offload()
            context.saved.reload()
        backward(model, records, (None,), context)
        return [loss, *(sink.buffer(piece.parameter) for piece in model.pieces() if piece.trained)]

    engine = OffloadEngine(CpuDevice(), HostArena(CpuDevice()))
    stored = run(ActivationStore(config.activations, engine))
    assert all(torch.equal(one, other) for one, other in zip(stored, run(None), strict=True))


def test_one_that_is_missing_or_too_old_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"ops.backend=te: transformer-engine cannot be imported"):
        build_te_attention(3, 12, 8, 0.3)

    class Old:
        def __init__(self, num_attention_heads, kv_channels) -> None:
            raise AssertionError("made in spite of its age")

    with pytest.raises(ConfigError, match="return_max_logit"):
        dot_product_attention(types.SimpleNamespace(DotProductAttention=Old), 3, 12, 8, math.pi)
