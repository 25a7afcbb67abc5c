"""What a run says before its first step.

It names parameters by update rule, tokens per step, the device, what is on and what is off.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from k2train.config.sections import ActivationsConfig, TrainConfig
from k2train.layout.tensors import model_tensors
from k2train.optim.optimizer import Optimizer
from k2train.schedule.actions import Action, Kind
from k2train.telemetry.tables import fact_table, new_table
from k2train.trainer.build import Run


def print_start(run: Run, run_dir: Path, first_step: int, changes: list[str], console: Console) -> None:
    """Print the tables of a run that is about to start or go on."""
    console.print(run_table(run, run_dir, first_step))
    console.print(parameter_table(run))
    console.print(feature_table(run))
    for change in changes:
        console.print(f"changed since the last start: {change}", highlight=False, markup=False)


def run_table(run: Run, run_dir: Path, first_step: int) -> Table:
    config, train = run.config, run.config.train
    table = fact_table("run", [])
    table.add_row("directory", str(run_dir))
    table.add_row("steps", f"{first_step} of {train.steps} done" if first_step else f"{train.steps}")
    sequences = f"{train.global_batch_tokens // train.seq_len} sequences of {train.seq_len}"
    table.add_row(
        "tokens per step",
        f"{train.global_batch_tokens:,} ({sequences}, {run.num_microbatches} microbatches a pipeline)",
    )
    table.add_row("device", f"{run.device.torch_device}, {train.dtype}")
    layout = run.layout
    table.add_row(
        "layout",
        f"{layout.world} rank(s): pp {layout.pp} x edp {layout.edp} x ep {layout.ep}, vpp {layout.vpp}",
    )
    table.add_row("schedule", f"{config.schedule.kind}")
    tokens, held_out = run.corpus.num_tokens("train"), run.corpus.num_tokens("valid")
    documents = run.corpus.num_documents("train")
    table.add_row(
        "data",
        f"{config.data.name}: {tokens:,} training tokens, {documents:,} documents; "
        f"held out {held_out:,} tokens",
    )
    return table


def parameter_table(run: Run) -> Table:
    """Parameters of the whole model by the rule that updates them.

    The correction biases belong to none.
    """
    labels = {row.name: row.rule.label for row in run.optimizer.ownership()}
    elements: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    for spec in model_tensors(run.config.model):
        elsewhere = "other ranks" if spec.trained else "correction bias (by load, no gradient)"
        label = labels.get(spec.name, elsewhere)
        elements[label] += spec.num_elements
        tensors[label] += 1
    table = new_table("parameters", ["updated by", "tensors", "parameters"])
    for label, count in elements.items():
        table.add_row(label, f"{tensors[label]:,}", f"{count:,}")
    table.add_row("all", f"{sum(tensors.values()):,}", f"{sum(elements.values()):,}")
    return table


def feature_table(run: Run) -> Table:
    """What is on and what is off, and where the optimizer's states are."""
    config = run.config
    optim, train, schedule = config.optim, config.train, config.schedule
    policies = Counter(
        getattr(config.activations, field.name) for field in dataclasses.fields(ActivationsConfig)
    )
    tau = optim.tau
    rows = [
        ("optimizer states", describe_states(run.optimizer, optim.host_adam)),
        ("attention", run.backend.words),
        ("QK-Clip", f"tau {tau:g}" if tau is not None else "off"),
        (
            "gradient clipping",
            f"norm {train.grad_clip_norm:g}" if train.grad_clip_norm is not None else "off",
        ),
        ("balance loss", f"alpha {train.balance_loss_alpha:g}" if train.balance_loss_alpha else "off"),
        ("correction bias", f"rate {train.bias_update_rate:g}" if train.bias_update_rate else "off"),
        *([("all-to-all", run.layout.dispatch_words)] if run.layout.ep > 1 else []),
        ("paired forward and backward", "on" if schedule.pair_forward_backward else "off"),
        ("weight gradients split off", "on" if schedule.split_weight_grad else "off"),
        ("activations", ", ".join(f"{count} {policy}" for policy, count in policies.items())),
        *describe_offload(run),
        ("checkpoints", describe_checkpoints(train)),
        ("evaluation", f"every {train.eval_every_steps} steps" if train.eval_every_steps else "at the end"),
    ]
    return fact_table("features", rows)


def describe_checkpoints(train: TrainConfig) -> str:
    """When checkpoints are written besides the last one."""
    steps, minutes = train.checkpoint_every_steps, train.checkpoint_every_minutes
    named = [f"{steps} steps" if steps else "", f"{minutes:g} minutes" if minutes else ""]
    every = " and every ".join(filter(None, named))
    return f"every {every}" if every else "at the end"


def describe_offload(run: Run) -> list[tuple[str, str]]:
    """How much of the schedule goes through host memory; nothing where no policy offloads."""
    if not run.config.activations.offloads:
        return []
    steps = [step for line in run.schedule.stages for step in line if isinstance(step, Action)]
    moved = sum(action.kind is Kind.OFFLOAD for action in steps)
    if not moved:
        return [("offload", "asked for, but every backward follows its forward too closely to gain by it")]
    total = run.num_microbatches * run.schedule.num_virtual_stages
    return [
        (
            "offload",
            f"{moved} of {total} microbatch passes, reloaded {run.config.schedule.prefetch_depth} ahead",
        )
    ]


def describe_states(optimizer: Optimizer, host_adam: str) -> str:
    """Where the states live and their bytes.

    Ranks own about as much as each other, so one speaks for all.
    """
    size = f"{optimizer.state_bytes / 1e6:,.1f} MB on rank 0"
    if not optimizer.states_on_host:
        return f"on the device, {size}"
    staging = f"through {optimizer.staging_bytes / 1e6:,.1f} MB on the device"
    in_rows = {row.rule.label for row in optimizer.ownership() if not row.rule.whole_matrices}
    return f"in host memory, {size}, {staging}; {' and '.join(sorted(in_rows))} by {host_adam}"
