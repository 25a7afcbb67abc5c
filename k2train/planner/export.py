"""A plan as a JSON document: the figures of the tables by stage, and the schedule's text form.

Bytes, seconds and FLOPs as plain numbers; nothing is rounded. Keys are stable: scripts read them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from k2train.config.convert import to_dict
from k2train.estimate.parameters import model_parameters
from k2train.planner.advice import Advice, problems
from k2train.planner.memory import StageMemory, sampled
from k2train.planner.plan import Plan
from k2train.schedule.simulation import StageTimes, Waits

CURVE_POINTS = 200


def plan_document(plan: Plan, advice: Advice | None = None, schedule_text: bool = True) -> dict[str, Any]:
    """Everything a script may want. schedule_text: K2's whole step takes three megabytes."""
    parameters = model_parameters(plan.config.model)
    document = {
        "name": plan.config.name,
        "fits": plan.fits,
        "problems": problems(plan),
        "advice": None if advice is None else dataclasses.asdict(advice),
        "layout": layout_document(plan),
        "parameters": {"total": parameters.total, "activated": parameters.activated},
        "attention": plan.program.estimator.workload.attention,
        "step_seconds": plan.step_seconds,
        "pipeline_seconds": plan.simulation.makespan_seconds,
        "tokens_per_second": plan.tokens_per_second,
        "mfu": plan.mfu,
        "bubble": {
            "stage": plan.busiest_stage,
            "seconds": plan.busiest.bubble_seconds,
            "share": plan.bubble_share,
            "share_by_stage": list(plan.simulation.bubble_share),
        },
        "exposed_seconds": exposed_seconds(plan),
        "update_seconds": [dataclasses.asdict(update) for update in plan.updates],
        "stages": [_times(index, times) for index, times in enumerate(plan.simulation.stages)],
        "memory": [_memory(stage) for stage in plan.memory],
        "memory_over_time": {
            "seconds": plan.simulation.makespan_seconds,
            "device_bytes": [
                sampled(curve, plan.simulation.makespan_seconds, CURVE_POINTS)
                for curve in plan.simulation.memory
            ],
            "host_bytes": [
                sampled(curve, plan.simulation.makespan_seconds, CURVE_POINTS)
                for curve in plan.simulation.host_memory
            ],
        },
        "activations": _activations(plan),
        "config": to_dict(plan.config),
    }
    if schedule_text:
        document["schedule"] = plan.program.schedule.to_text()
    return document


def layout_document(plan: Plan) -> dict[str, Any]:
    """Degrees and what every virtual stage holds."""
    layout, schedule = plan.program.layout, plan.program.schedule
    return {
        "world": layout.world,
        "nodes": layout.num_nodes,
        "gpus_per_node": layout.gpus_per_node,
        "pp": layout.pp,
        "vpp": layout.vpp,
        "ep": layout.ep,
        "edp": layout.edp,
        "dp": layout.dp,
        "dispatch": layout.dispatch,
        "dispatch_parts": layout.relay_parts,
        "num_microbatches": schedule.num_microbatches,
        "virtual_stages": [
            {
                "stage": schedule.placement[index],
                "first_layer": piece.first,
                "num_layers": piece.num_layers,
                "embedding": piece.embedding,
                "head": piece.head,
            }
            for index, piece in enumerate(plan.program.pieces)
        ],
    }


def exposed_seconds(plan: Plan) -> dict[str, float]:
    """Communication the busiest stage's compute stream stands still for, by kind."""
    waits = plan.busiest.waits
    return {
        "ep": waits.ep,
        "pp": waits.pp,
        "pcie": waits.copy,
        "dp": plan.slowest_update.data_parallel,
        "ep_steady": plan.busiest.steady.ep,
        "pp_steady": plan.busiest.steady.pp,
    }


def _times(stage: int, times: StageTimes) -> dict[str, Any]:
    phases = {"warmup": times.warmup, "steady": times.steady, "cooldown": times.cooldown}
    return {
        "stage": stage,
        "busy_seconds": times.busy_seconds,
        **{name: _waits(w) for name, w in phases.items()},
    }


def _waits(waits: Waits) -> dict[str, float]:
    return {"ep": waits.ep, "pp": waits.pp, "pcie": waits.copy, "bubble": waits.bubble}


def _memory(stage: StageMemory) -> dict[str, Any]:
    """Every kind under its own name with _bytes behind it, and what they add up to."""
    plain = ("stage", "ranks_per_node")
    kinds = {name: value for name, value in dataclasses.asdict(stage).items() if name not in plain}
    totals = {"device_bytes": stage.device, "states_bytes": stage.states}
    fits = {"fits": stage.fits_device and stage.fits_host}
    counts = {name: getattr(stage, name) for name in plain}
    return {**counts, **{f"{name}_bytes": value for name, value in kinds.items()}, **totals, **fits}


def _activations(plan: Plan) -> list[dict[str, Any]]:
    """Bytes for a token and layer of every name, once for each kind of layer that has it."""
    estimator = plan.program.estimator
    tokens = estimator.workload.tokens
    return [
        {
            "layer": kind,
            "name": tensor.name,
            "policy": tensor.policy,
            "computed_bytes_per_token": tensor.full_bytes / tokens,
            "device_bytes_per_token": tensor.device_bytes / tokens,
            "host_bytes_per_token": tensor.host_bytes / tokens,
        }
        for kind, layer in estimator.layers.items()
        for tensor in layer.saved
    ]
