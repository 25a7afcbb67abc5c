"""What the plan says host states hold on the device is what the optimizer of a run takes there."""

from __future__ import annotations

import pytest
import torch

from k2train.config.compose import load_config
from k2train.config.schema import Config
from k2train.device.cpu import CpuDevice
from k2train.layout.build import build_layout
from k2train.layout.layout import Layout
from k2train.parallel.communicator import World
from k2train.parallel.groups import build_groups
from k2train.parallel.threads import run_threads
from k2train.planner.plan import build_plan
from k2train.trainer.build import build_model_optimizer, build_models
from k2train.update_rules.chosen import all_rules

GRIDS = [(1, 1, 1, 1), (2, 1, 1, 2), (2, 1, 2, 2), (1, 3, 2, 1), (2, 2, 4, 2), (4, 1, 2, 1), (1, 8, 1, 1)]


def staging_bytes(world: World, config: Config, layout: Layout) -> int:
    """Of the optimizer that a run makes on this rank."""
    groups = build_groups(layout.grid, world, layout.relay_ranks)
    models = build_models(config, layout, groups, CpuDevice(torch.device("cpu")))
    return build_model_optimizer(config, models, groups, CpuDevice()).staging_bytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("name", [named.name for named in all_rules()])
@pytest.mark.parametrize(("pp", "edp", "ep", "vpp"), GRIDS)
def test_the_plan_predicts_the_staging_of_every_stage_to_the_byte(
    words, pp, edp, ep, vpp, name, dtype: str
) -> None:
    config = load_config(
        [
            *words,
            f"layout.pp={pp}",
            f"layout.edp={edp}",
            f"layout.ep={ep}",
            f"layout.vpp={vpp}",
            f"optim.name={name}",
            f"train.dtype={dtype}",
            "optim.states=host",
            "train.global_batch_tokens=3072",
        ]
    )
    layout = build_layout(config.layout, config.cluster, config.model, config.train.seq_len)
    measured = run_threads(layout.world, lambda world: staging_bytes(world, config, layout))
    of_stages = [max(measured[first : first + layout.dp]) for first in range(0, layout.world, layout.dp)]
    assert [memory.optimizer_on_device for memory in build_plan(config).memory] == of_stages
    assert min(of_stages) > 0


def test_states_on_the_device_have_no_staging_and_are_counted_themselves(words) -> None:
    plan = build_plan(load_config([*words, "optim.states=device"]))
    assert plan.memory[0].optimizer_on_device == plan.states[0].optimizer_bytes
