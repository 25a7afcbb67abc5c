"""Transformer Engine's grouped product for the experts: `general_grouped_gemm`, with plain 16-bit
tensors.

It takes the place of `grouped.grouped_mm` in the layer's two products y = x W^T and dx = dy W; what
is saved, and the weight gradient with its FP32 sums, stay ours. It wants the experts' row counts on
the host, which a route knows. An optional dependency, imported when a run asks for
`ops.backend=te`. Not yet run on a GPU: tested with a stand-in that has the signature of Transformer
Engine 2.11 to 2.18. Letters: M rows, L local experts, I input and O output features.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from k2train.config.errors import ConfigError


class TeGroupedMM:
    """`grouped_mm` by Transformer Engine. general_grouped_gemm: its function. It has no state that
    a call changes."""

    def __init__(self, general_grouped_gemm: Callable[..., Any]) -> None:
        self._gemm = general_grouped_gemm

    def __call__(
        self,
        x_MI: torch.Tensor,
        weight_LIO: torch.Tensor,
        offsets_L: torch.Tensor,
        rows_L: Sequence[int] | None = None,
    ) -> torch.Tensor:
        """Each expert's rows of x times its own matrix (M, O); rows past the last expert's are left
        undefined.

        The weight is contiguous, or the transpose of a contiguous tensor. offsets_L is not read:
        ValueError without rows_L.
        """
        if rows_L is None:
            raise ValueError(
                "Transformer Engine's grouped product needs every expert's number of rows on the host"
            )
        y_MO = x_MI.new_empty(x_MI.shape[0], weight_LIO.shape[2])
        # Releases before 2.17 were not written for a call in which no expert has rows.
        if any(rows_L):
            self._multiply(x_MI, weight_LIO, y_MO, list(rows_L))
        return y_MO

    def _multiply(
        self, x_MI: torch.Tensor, weight_LIO: torch.Tensor, y_MO: torch.Tensor, rows: list[int]
    ) -> None:
        """In its words A is the weight and B are the rows: y = B A for layout NN, y = B A^T for TN.
        It reads memory as if contiguous, whatever the strides say."""
        transposed = not weight_LIO.is_contiguous()
        matrices = weight_LIO.transpose(1, 2) if transposed else weight_LIO
        assert matrices.is_contiguous(), "the weight is a parameter or its transpose"
        self._gemm(
            list(matrices.unbind(0)),
            list(x_MI.contiguous()[: sum(rows)].split(rows)),
            [y_MO],
            quantization_params=[None] * len(rows),
            out_dtype=y_MO.dtype,
            layout="TN" if transposed else "NN",
            m_splits=rows,
            grad=not transposed,  # as Transformer Engine's own layer says it for dx = dy W
            single_output=True,
        )


def build_te_grouped() -> TeGroupedMM:
    """Raises ConfigError where Transformer Engine is missing, or its grouped product has other
    arguments."""
    try:
        from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm
    except ImportError as error:
        raise ConfigError(
            "ops.backend",
            "te",
            f"transformer-engine's grouped product cannot be imported: {error}",
            "install it (pip install 'k2train[gpu]'), or set ops.backend=auto",
        ) from error
    return TeGroupedMM(checked(general_grouped_gemm))


_ARGUMENTS = {"quantization_params", "out_dtype", "layout", "m_splits", "grad", "single_output"}


def checked(general_grouped_gemm: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself if it has the arguments used here: they came with release 2.11. Raises
    ConfigError."""
    known = set(inspect.signature(general_grouped_gemm).parameters)
    if not known >= _ARGUMENTS:
        raise ConfigError(
            "ops.backend",
            "te",
            "this transformer-engine's general_grouped_gemm has other arguments than releases 2.11 to 2.18",
            "install one of these, or set ops.backend=auto",
        )
    return general_grouped_gemm
