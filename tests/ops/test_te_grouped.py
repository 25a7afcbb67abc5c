"""Transformer Engine's grouped product behind `ops.backend=te`, with a stand-in that has its
signature of 2.11 to 2.18.

It has run on no GPU: what is shown is that its arguments are right, and what becomes of what it
returns.
"""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch

import k2train.ops.backend
from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.config.ops import OpsConfig
from k2train.model.context import MicrobatchContext
from k2train.model.loss import CrossEntropy
from k2train.model.model import build_model, forward_backward
from k2train.model.pieces import whole_model
from k2train.ops.backend import OpsBackend, choose_backend
from k2train.ops.grouped import grouped_linear, grouped_mm_reference
from k2train.ops.te_grouped import TeGroupedMM, build_te_grouped, checked
from k2train.ops.weight_grad import PlainGradients, WeightGradQueue


def as_memory(tensor):
    """The shape over the storage, strides unread: how Transformer Engine wraps a tensor."""
    return torch.as_strided(tensor, tensor.shape, torch.empty(tensor.shape).stride())


class GeneralGroupedGemm:
    """As Transformer Engine's: results one after another from where out[0] begins, nothing for an
    empty expert.

    layouts: of the calls so far.
    """

    def __init__(self) -> None:
        self.layouts = []

    def __call__(
        self,
        A,
        B,
        out,
        quantization_params,
        out_dtype,
        layout: str = "TN",
        m_splits=None,
        gelu: bool = False,
        grad: bool = False,
        accumulate: bool = False,
        bias=None,
        use_bias: bool = False,
        use_split_accumulator: bool = False,
        D_dtype=None,
        single_output: bool = False,
    ):
        assert not any((gelu, accumulate, bias, use_bias, use_split_accumulator, D_dtype))
        assert single_output is True
        assert [type(x) for x in (A, B, out, m_splits)] == [list] * 4
        assert [type(rows) for rows in m_splits] == [int] * len(A)
        assert quantization_params == [None] * len(A)
        assert [len(rows) for rows in B] == m_splits
        assert any(m_splits), "releases before 2.17 were not written for this"
        assert {t.dtype for t in (*A, *B, *out)} == {out_dtype}
        assert (layout, grad) in (("TN", False), ("NN", True))
        self.layouts.append(layout)
        start = 0
        for matrix, rows in zip(map(as_memory, A), map(as_memory, B), strict=True):
            out[0][start : start + len(rows)] = rows @ (matrix.t() if layout == "TN" else matrix)
            start += len(rows)
        return out, [None] * len(A), [None] * len(A)


@pytest.fixture
def gemm():
    return GeneralGroupedGemm()


COUNTS = [(3, 0, 4), (0, 0, 5), (5, 2, 0), (0, 0, 0)]


def factors(counts, spare: int = 0, dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sum(counts) + spare, 6, generator=generator, dtype=dtype).requires_grad_()
    weight = torch.randn(len(counts), 5, 6, generator=generator, dtype=dtype).requires_grad_()
    return x, weight, torch.tensor(counts).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("spare", [0, 2])
def test_both_products_are_those_of_a_loop_over_experts(counts, spare: int, gemm) -> None:
    """Also experts without rows, and rows past the last expert's, which are left undefined."""
    x, weight, offsets = (t.detach() for t in factors(counts, spare))
    known = sum(counts)
    transposed = weight.transpose(1, 2)
    expected = grouped_mm_reference(x, transposed, offsets)
    torch.testing.assert_close(TeGroupedMM(gemm)(x, transposed, offsets, counts)[:known], expected[:known])
    dy = expected.t().contiguous().t()  # rows not contiguous
    dx = TeGroupedMM(gemm)(dy, weight, offsets, counts)
    torch.testing.assert_close(dx[:known], grouped_mm_reference(dy, weight, offsets)[:known])
    assert dx.shape == x.shape
    assert gemm.layouts == (["TN", "NN"] if known else [])


@pytest.mark.parametrize("counts", COUNTS)
def test_a_layer_has_its_two_products_from_it_and_our_weight_gradient(counts, gemm) -> None:
    x, weight, offsets = factors(counts)
    dy = torch.randn(sum(counts), 5, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    found = []
    for product in ({}, {"product": TeGroupedMM(gemm)}):
        queue, sink = WeightGradQueue(), PlainGradients()
        y = grouped_linear(x, weight, offsets, queue.slot((0, 0)), counts, **product)
        (dx,) = torch.autograd.grad(y, x, dy)
        queue.drain((0, 0), sink)
        found.append((y.detach(), dx, sink.buffer(weight)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    assert gemm.layouts == (["TN", "NN"] if any(counts) else [])


def test_row_counts_that_only_the_device_knows_are_refused(gemm) -> None:
    x, weight, offsets = factors((2, 3))
    with pytest.raises(ValueError, match="on the host"):
        TeGroupedMM(gemm)(x, weight.transpose(1, 2), offsets)


def test_a_model_built_with_it_has_the_gradients_of_one_without(gemm) -> None:
    """Two MoE layers' two products, forward and backward: eight calls. Both add up in float64."""
    config = load_config(["experiment=tiny"]).model
    model = dataclasses.replace(config, num_hidden_layers=config.first_k_dense_replace + 2)
    tokens = torch.randint(model.vocab_size, (1, 20), generator=torch.Generator().manual_seed(0))

    def run(backend: OpsBackend) -> list[torch.Tensor]:
        built = build_model(model, whole_model(model), torch.float64, backend=backend)
        built.initialise(0)
        sink = PlainGradients()
        loss = forward_backward(
            built, tokens, MicrobatchContext(1, sink, loss=CrossEntropy(tokens.roll(-1, 1), 0.05))
        )
        return [loss, *(sink.buffer(piece.parameter) for piece in built.pieces() if piece.trained)]

    stock = run(OpsBackend())
    assert gemm.layouts == []
    for one, other in zip(run(OpsBackend(grouped=TeGroupedMM(gemm))), stock, strict=True):
        torch.testing.assert_close(one, other)
    assert gemm.layouts == ["TN"] * 4 + ["NN"] * 4


def workspaces_from_the_caller(
    A,
    B,
    out,
    out_dtype,
    workspaces,
    layout: str = "TN",
    m_splits=None,
    gelu: bool = False,
    grad: bool = False,
    single_output: bool = False,
) -> None:
    """Transformer Engine 2.8 and 2.9."""


def without_quantization_params(
    A, B, out, out_dtype, layout: str = "TN", m_splits=None, grad: bool = False, single_output: bool = False
) -> None:
    """Transformer Engine 2.10."""


@pytest.mark.parametrize("old", [workspaces_from_the_caller, without_quantization_params])
def test_a_release_with_other_arguments_is_refused_by_name(old) -> None:
    with pytest.raises(ConfigError, match=r"ops.backend=te: .* other arguments than releases 2\.11 to 2\.18"):
        checked(old)


def test_one_that_is_missing_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"ops.backend=te: .* grouped product cannot be imported"):
        build_te_grouped()


def test_a_run_that_asks_for_te_has_its_experts_products_from_it(
    monkeypatch: pytest.MonkeyPatch, gemm
) -> None:
    """An installed package is simulated by modules of its names; no other backend takes the
    product."""

    class DotProductAttention:
        def __init__(self, return_max_logit, **others) -> None:
            pass

    pytorch = types.ModuleType("transformer_engine.pytorch")
    pytorch.DotProductAttention = DotProductAttention
    extensions = types.ModuleType("transformer_engine.pytorch.cpp_extensions")
    extensions.general_grouped_gemm = gemm
    package = types.ModuleType("transformer_engine")
    package.pytorch, pytorch.cpp_extensions = pytorch, extensions
    for module in (package, pytorch, extensions):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(k2train.ops.backend, "_installed", lambda name: True)
    model, device = load_config(["experiment=tiny"]).model, torch.device("cuda:0")
    chosen = choose_backend(OpsConfig("te"), model, "bfloat16", None, device)
    assert isinstance(chosen.grouped, TeGroupedMM)
    x, weight, offsets = (t.detach() for t in factors((2, 3)))
    chosen.grouped(x, weight.transpose(1, 2), offsets, (2, 3))
    assert gemm.layouts == ["TN"]
    others = [choose_backend(OpsConfig(b), model, "bfloat16", None, device) for b in ("auto", "torch")]
    assert all(other.grouped is OpsBackend().grouped for other in others)
