"""SGD with momentum against torch.optim.SGD. What a whole run does with it:
tests/trainer/test_every_rule.py."""

from __future__ import annotations

import pytest
import torch

from k2train.config.compose import load_config
from k2train.config.errors import ConfigError
from k2train.optim.adam import check_host_adam
from k2train.planner.plan import build_plan
from k2train.update_rules.rules.sgd import Sgd

CASES = [(0.0, False), (0.9, False), (0.9, True)]  # torch refuses Nesterov without momentum


@pytest.mark.parametrize("decayed", [True, False])
@pytest.mark.parametrize(("momentum", "nesterov"), CASES)
def test_sgd_equals_torchs(momentum: float, nesterov: bool, decayed: bool) -> None:
    """Float64 on both sides. Both may round each of a step's few operations once in another way, so
    after six steps weights of about 1 agree within some 1e-15.

    torch couples its decay to the gradient, so it gets none here. Instead the weights that it
    begins a step from are decayed by hand, as Algorithm 1 of the paper says.
    """
    rule = Sgd(momentum, nesterov, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    theirs, M = torch.nn.Parameter(ours.clone()), torch.zeros_like(ours)
    oracle = torch.optim.SGD([theirs], momentum=momentum, nesterov=nesterov)
    for step in range(6):
        lr = 0.1 / (step + 1)
        gradient = torch.randn(7, 5, dtype=torch.float64, generator=generator)
        rule.update(ours, [M], gradient, lr, decayed, step)
        theirs.grad = gradient.clone()
        theirs.data.mul_(1 - lr * 0.1 if decayed else 1.0)
        oracle.param_groups[0]["lr"] = lr
        oracle.step()
        torch.testing.assert_close(ours, theirs.data, rtol=0, atol=4e-15)


def test_the_plan_of_k2_by_sgd_keeps_two_numbers_of_a_parameter_and_multiplies_no_matrix() -> None:
    """AdamW keeps three; both are cut by rows in the same way, so the bytes are as two to three."""
    sgd, adamw = (
        build_plan(load_config(["experiment=k2", f"optim.name={name}"])) for name in ("sgd", "adamw")
    )
    for ours, theirs in zip(sgd.states, adamw.states, strict=True):
        assert 3 * ours.optimizer_bytes == 2 * theirs.optimizer_bytes
        assert ours.matmul_flops == 0
    # Host states: gradient, master and momentum are five numbers to read or write, AdamW's are
    # seven.
    assert all(
        5 * theirs.row_numbers_moved == 7 * ours.row_numbers_moved
        for ours, theirs in zip(sgd.states, adamw.states, strict=True)
    )
    assert all(a.update < b.update for a, b in zip(sgd.updates, adamw.updates, strict=True))


def test_deepspeeds_adamw_is_refused_where_nothing_is_updated_by_adamw() -> None:
    optim = load_config(["optim.name=sgd", "optim.states=host", "optim.host_adam=deepspeed"]).optim
    with pytest.raises(ConfigError, match=r"optim\.host_adam=deepspeed: updates AdamW's parameters"):
        check_host_adam(optim, torch.float32)
