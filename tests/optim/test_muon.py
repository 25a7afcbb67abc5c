"""Muon against torch.optim.Muon and against the SVD."""

from __future__ import annotations

import pytest
import torch

from k2train.config.optim import NewtonSchulzDtype
from k2train.ops.dtypes import DTYPES
from k2train.update_rules.rules.muon import Muon, newton_schulz

SHAPES = [(16, 16), (24, 40), (40, 24), (3, 100), (100, 3), (1, 8), (8, 1), (65, 33)]


def update(rule: Muon, W: torch.Tensor, M: torch.Tensor, G: torch.Tensor, lr: float) -> None:
    """One update of one matrix."""
    rule.update(W, [M], G, lr, decayed=True, num_updates=0)


def quintic_reference(G: torch.Tensor, steps: int) -> torch.Tensor:
    """Newton-Schulz acts on singular values alone, so apply its polynomial to them: U p(p(...p(S)))
    V^T."""
    U, S, Vh = torch.linalg.svd(G, full_matrices=False)
    S = S / torch.linalg.vector_norm(S)
    for _ in range(steps):
        S = 3.4445 * S - 4.7750 * S**3 + 2.0315 * S**5
    return U @ torch.diag(S) @ Vh


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 5, 9])
def test_newton_schulz_is_its_polynomial_on_the_singular_values(shape: tuple[int, int], steps: int) -> None:
    G = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(steps))
    # Float64 rounding, amplified at most 3.4445 times an iteration.
    torch.testing.assert_close(
        newton_schulz(G, steps, "float64"), quintic_reference(G, steps), rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_gives_what_its_matrices_give(shape: tuple[int, int], dtype: NewtonSchulzDtype) -> None:
    G = torch.randn(5, *shape, generator=torch.Generator().manual_seed(1))
    one_by_one = torch.stack([newton_schulz(matrix, 5, dtype) for matrix in G])
    # The same bits, but where the library picks another kernel for another batch size: then within
    # rounding.
    torch.testing.assert_close(
        newton_schulz(G, 5, dtype), one_by_one, rtol=0, atol=64 * torch.finfo(DTYPES[dtype]).eps
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_zero_matrix_gives_zero_and_a_tiny_one_a_full_step(dtype: NewtonSchulzDtype) -> None:
    G = torch.randn(6, 9, generator=torch.Generator().manual_seed(2))
    assert torch.equal(newton_schulz(torch.zeros(6, 9), 5, dtype), torch.zeros(6, 9, dtype=DTYPES[dtype]))
    tiny = newton_schulz(G * 2**-20, 5, dtype).double()
    torch.testing.assert_close(
        tiny, newton_schulz(G, 5, dtype).double(), rtol=0, atol=64 * torch.finfo(DTYPES[dtype]).eps
    )


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(16, 32), (48, 20), (64, 64)])
def test_muon_equals_torch_within_the_rounding_of_its_newton_schulz(
    shape: tuple[int, int], nesterov: bool
) -> None:
    """torch runs Newton-Schulz in bfloat16. Its own rounding is its distance from the same run in
    float64; ours in bfloat16 may be as far on the other side, ours in float64 lies between.
    """
    generator = torch.Generator().manual_seed(3)
    start = torch.randn(shape, generator=generator)
    theirs = torch.nn.Parameter(start.clone())
    torch_muon = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
    )
    ours = {dtype: start.double() for dtype in DTYPES}
    momenta = {dtype: torch.zeros_like(start).double() for dtype in ours}
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        theirs.grad = gradient.clone()
        torch_muon.step()
        for dtype, weight in ours.items():
            rule = Muon(nesterov=nesterov, newton_schulz_dtype=dtype)
            update(rule, weight, momenta[dtype], gradient.double(), 0.02)
    moved = torch.linalg.norm(ours["float64"] - start)
    torch_rounding = torch.linalg.norm(theirs.double() - ours["float64"]) / moved
    assert torch_rounding < 0.02, "bfloat16 has 8 bits; 5 iterations leave about 1 %"
    assert torch.linalg.norm(theirs - ours["bfloat16"]) / moved < 2 * torch_rounding
    assert torch.linalg.norm(ours["float32"] - ours["float64"]) / moved < 1e-4


def test_torch_with_a_float64_newton_schulz_gives_our_update_tightly() -> None:
    """torch's averaged momentum, (1 - mu) times ours, written out with the reference polynomial."""
    generator = torch.Generator().manual_seed(4)
    ours = torch.randn(12, 30, dtype=torch.float64, generator=generator)
    theirs, average, momentum = ours.clone(), torch.zeros_like(ours), torch.zeros_like(ours)
    for _ in range(5):
        gradient = torch.randn(12, 30, dtype=torch.float64, generator=generator)
        average.lerp_(gradient, 1 - 0.95)
        direction = gradient.lerp(average, 0.95)
        theirs.mul_(1 - 0.02 * 0.1).sub_(0.02 * 0.2 * 30**0.5 * quintic_reference(direction, 5))
        update(Muon(newton_schulz_dtype="float64"), ours, momentum, gradient, 0.02)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)


def test_the_update_has_the_rms_of_adamw() -> None:
    """0.2 sqrt(max(n, m)) times a semi-orthogonal matrix has RMS 0.2; singular values between 0.7
    and 1.2 blur it."""
    W, M = torch.zeros(64, 96), torch.zeros(64, 96)
    G = torch.randn(64, 96, generator=torch.Generator().manual_seed(5))
    update(Muon(weight_decay=0), W, M, G, 1.0)
    assert 0.14 < W.square().mean().sqrt() < 0.24
