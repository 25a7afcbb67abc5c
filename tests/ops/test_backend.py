"""Which kernels a run takes, and what it is told where they cannot run."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.config.ops import AttentionSite, OpsConfig, attention_kernel, attention_words, exact_above
from k2train.ops.backend import OpsBackend, choose_backend

HOPPER = AttentionSite(True, "bfloat16", 192, 128)


@pytest.mark.parametrize(
    ("backend", "changes", "kernel"),
    [
        ("auto", {}, "cudnn"),
        ("auto", {"query_width": 128}, "cudnn"),
        ("auto", {"query_width": 192, "value_width": 192}, "triton"),
        ("auto", {"query_width": 100}, "triton"),
        ("auto", {"cudnn": False}, "triton"),
        ("auto", {"capability": (8, 0)}, "triton"),
        ("auto", {"capability": (7, 5)}, "tiles"),
        ("auto", {"cudnn": False, "triton": False}, "tiles"),
        ("auto", {"triton": False}, "cudnn"),
        ("auto", {"dtype": "float32"}, "tiles"),
        ("auto", {"on_gpu": False}, "tiles"),
        ("torch", {}, "cudnn"),
        ("torch", {"cudnn": False}, "tiles"),
        ("torch", {"on_gpu": False}, "tiles"),
        ("triton", {}, "triton"),
        ("te", {}, "te"),
    ],
)
def test_the_fastest_that_can_run_is_taken(backend: str, changes, kernel: str) -> None:
    assert attention_kernel(backend, dataclasses.replace(HOPPER, **changes)) == kernel


@pytest.mark.parametrize(
    ("backend", "changes", "why"),
    [
        ("triton", {"on_gpu": False}, "needs a CUDA device"),
        ("triton", {"triton": False}, "not installed"),
        ("triton", {"query_width": 300}, "at most 256"),
        ("triton", {"capability": (7, 0)}, "8.0"),
        ("te", {"te": False}, "not installed"),
        ("te", {"dtype": "float32"}, "train.dtype is float32"),
    ],
)
def test_a_backend_asked_for_by_name_that_cannot_run_is_refused(backend: str, changes, why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        attention_kernel(backend, dataclasses.replace(HOPPER, **changes))
    assert (caught.value.field, caught.value.value) == ("ops.backend", backend)
    assert "ops.backend=auto" in caught.value.remedy


def test_logits_are_exact_from_where_qk_clip_would_clip_them() -> None:
    assert exact_above(OpsConfig(), 100.0) == 100.0
    assert exact_above(OpsConfig(), None) == math.inf
    assert exact_above(OpsConfig(exact_max_logits=True), 100.0) == -math.inf
    assert "exact above 100" in attention_words("cudnn", 100.0)
    assert attention_words("triton", 100.0).endswith("exact")


@pytest.mark.parametrize("optimizer", ["muonclip", "adamw"])
def test_the_choice_follows_the_config_and_the_device(optimizer: str) -> None:
    config = load_config(["experiment=k2", f"optim={optimizer}"])
    model, tau = config.model, config.optim.tau
    assert tau == (100.0 if optimizer == "muonclip" else None)
    on_host = choose_backend(config.ops, model, "bfloat16", tau, torch.device("cpu"))
    assert (on_host.attention, on_host.heads_inside) == ("tiles", False)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        choose_backend(OpsConfig("triton"), model, "bfloat16", tau, torch.device("cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device where torch finds none")
def test_a_rehearsed_gpu_takes_what_a_hopper_gpu_takes() -> None:
    config = load_config(["experiment=k2"])
    chosen = choose_backend(config.ops, config.model, "bfloat16", config.optim.tau, torch.device("cuda:0"))
    assert (chosen.attention, chosen.exact_above, chosen.heads_inside) == ("cudnn", 100.0, True)
    stock = choose_backend(OpsConfig("torch"), config.model, "bfloat16", None, torch.device("cuda:0"))
    assert (stock.attention, stock.triton) == ("cudnn", False)
    assert "stock" in stock.words


def test_a_choice_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        OpsBackend().attention = "cudnn"
