"""A plan as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import RenderableType
from rich.table import Table

from k2train.architecture.layer import KIND_WORDS
from k2train.config.ops import attention_words, exact_above
from k2train.estimate.activations import SavedTensor
from k2train.estimate.parameters import model_parameters
from k2train.planner.advice import Advice, problems
from k2train.planner.memory import StageMemory
from k2train.planner.plan import Plan
from k2train.planner.text import count, gigabytes, pieces, ranges, seconds, share
from k2train.telemetry.tables import fact_table, new_table

DEVICE_NOTE = (
    "E embedding, H head. At the moment the stage is fullest: activations saved for the backward or in transit, buffers of "
    "the layers at work (exchanges, rebuilt tensors, gradients, logits), and the weight-gradient queue. Other: driver, "
    "libraries, fragmentation.\n"
)
WAITS_NOTE = (
    "Exposed means that the compute stream stands still for it. Warm-up lasts until the first microbatch is back, cool-down "
    "begins when the last one enters.\n"
)


def plan_tables(plan: Plan, advice: Advice | None, note: str | None = None) -> list[RenderableType]:
    """All tables of one plan, in reading order, and the verdict.

    advice: for a plan that does not fit. note: on what it waits for.
    """
    return [
        layout_table(plan),
        device_table(plan),
        DEVICE_NOTE,
        host_table(plan),
        activation_table(plan),
        step_table(plan),
        waits_table(plan),
        WAITS_NOTE,
        *([note] if note else []),
        *verdict(plan, advice),
    ]


def layout_table(plan: Plan) -> Table:
    """Who is where."""
    config, layout, schedule = plan.config, plan.program.layout, plan.program.schedule
    parameters = model_parameters(config.model)
    moe = f"; {layout.num_local_experts} of {config.model.n_routed_experts} experts on a rank"
    virtual = layout.vpp * plan.program.parameter_copies
    return fact_table(
        f"Layout: {config.name} on {config.cluster.name}",
        [
            (
                "model",
                f"{count(parameters.total)} parameters, {count(parameters.activated)} activated, "
                f"{config.model.num_hidden_layers} layers",
            ),
            ("world", f"{layout.world} ranks on {layout.num_nodes} nodes of {layout.gpus_per_node}"),
            ("pipeline", f"{layout.pp} stages x {virtual} virtual stages (layout.pp, layout.vpp)"),
            ("experts", f"{layout.ep}-way (layout.ep){moe if config.model.num_moe_layers else ''}"),
            *(
                [("all-to-all", f"{layout.dispatch_words} (layout.dispatch)")]
                if layout.ep > 1 and config.model.num_moe_layers
                else []
            ),
            ("replicas", f"{layout.edp} of an expert (layout.edp), {layout.dp} of anything else on a stage"),
            (
                "batch",
                f"{count(config.train.global_batch_tokens)} tokens = {layout.dp} ranks x {schedule.num_microbatches} "
                f"microbatches x {config.train.microbatch_size} x {config.train.seq_len}",
            ),
            ("schedule", f"{schedule.name}, {_switches(plan)}"),
            ("attention", f"{_attention(plan)} (ops.backend)"),
        ],
    )


def _attention(plan: Plan) -> str:
    workload, config = plan.program.estimator.workload, plan.config
    return attention_words(workload.attention, exact_above(config.ops, config.optim.tau))


def _switches(plan: Plan) -> str:
    section = plan.config.schedule
    names = [
        f"{section.extra_warmup_microbatches} more warm-up microbatch"
        if section.extra_warmup_microbatches
        else "",
        "forward and backward paired" if section.pair_forward_backward else "",
        "weight gradients split off" if section.split_weight_grad else "",
    ]
    return ", ".join(filter(None, names)) or "no further passes"


def device_table(plan: Plan) -> Table:
    """Memory of the fullest rank of every stage; equal neighbours share a row."""
    first = plan.memory[0]
    table = new_table(
        f"Device memory in GB (1e9 bytes), fullest rank of a stage, of {gigabytes(first.capacity)} GB",
        [
            "stage",
            "layers",
            "params",
            "grads",
            "optim",
            "activ.",
            "buffers",
            "W queue",
            "other",
            "total",
            "free",
        ],
        text_columns=2,
    )
    for stages, memory in _grouped(plan.memory, _device_key, plan):
        room = memory.capacity - memory.device
        numbers = [
            memory.parameters,
            memory.gradients,
            memory.optimizer_on_device,
            memory.activations,
            memory.transient,
            memory.weight_queue,
            memory.reserved,
            memory.device,
        ]
        free = gigabytes(room) if room >= 0 else f"-{gigabytes(-room)} !"
        held = pieces(plan.program.pieces_of(memory.stage))
        table.add_row(
            ranges(stages), held, *map(gigabytes, numbers), free, style=None if room >= 0 else "red"
        )
    return table


def host_table(plan: Plan) -> Table:
    """Host memory of a node of every stage."""
    first = plan.memory[0]
    table = new_table(
        f"Host memory in GB, {first.ranks_per_node} ranks on a node of {gigabytes(first.host_capacity)} GB",
        ["stage", "optimizer, rank", "activations, rank", "node", "free"],
    )
    for stages, memory in _grouped(plan.memory, _host_key, plan):
        room = memory.host_capacity - memory.node
        free = gigabytes(room) if room >= 0 else f"-{gigabytes(-room)} !"
        numbers = [memory.optimizer_on_host, memory.activations_on_host, memory.node]
        table.add_row(ranges(stages), *map(gigabytes, numbers), free, style=None if room >= 0 else "red")
    return table


def _device_key(memory: StageMemory, held: str) -> tuple[object, ...]:
    return held, memory.states, memory.activations, memory.transient, memory.weight_queue


def _host_key(memory: StageMemory, held: str) -> tuple[object, ...]:
    return memory.optimizer_on_host, memory.activations_on_host, memory.node


def _grouped(
    memories: Sequence[StageMemory], key: Callable[[StageMemory, str], object], plan: Plan
) -> list[tuple[list[int], StageMemory]]:
    """Neighbouring stages with the same figures, together."""
    groups: list[tuple[list[int], StageMemory]] = []
    previous: object = None
    for memory in memories:
        current = key(memory, pieces(plan.program.pieces_of(memory.stage)))
        if groups and current == previous:
            groups[-1][0].append(memory.stage)
        else:
            groups.append(([memory.stage], memory))
        previous = current
    return groups


def activation_table(plan: Plan) -> Table:
    """Bytes of every named activation, for a token and layer."""
    estimator = plan.program.estimator
    tokens = estimator.workload.tokens
    table = new_table(
        "Activations between forward and backward, bytes for a token and layer",
        ["name", "policy", "as computed", "on device", "on host"],
        text_columns=2,
    )
    shown: set[str] = set()
    for kind, layer in estimator.layers.items():
        for tensor in layer.saved:
            if tensor.name not in shown:
                table.add_row(tensor.name, tensor.policy.replace("_", " + "), *_per_token([tensor], tokens))
        shown |= {tensor.name for tensor in layer.saved}
        table.add_row(
            f"{KIND_WORDS[kind]}, all names",
            "",
            *_per_token(layer.saved, tokens),
            style="bold",
            end_section=True,
        )
    return table


def _per_token(saved: Sequence[SavedTensor], tokens: int) -> list[str]:
    sums = [
        sum(getattr(tensor, name) for tensor in saved)
        for name in ("full_bytes", "device_bytes", "host_bytes")
    ]
    return [f"{total / tokens:,.0f}" for total in sums]


def step_table(plan: Plan) -> Table:
    """The step as a whole."""
    world, estimator = plan.program.layout.world, plan.program.estimator
    recomputed = sum(map(estimator.recompute_flops, plan.program.pieces))
    forward = sum(map(estimator.forward_flops, plan.program.pieces))
    return fact_table(
        "Step",
        [
            (
                "step time",
                f"{seconds(plan.step_seconds)} s, of it {seconds(plan.simulation.makespan_seconds)} s in the pipeline",
            ),
            (
                "tokens",
                f"{plan.tokens_per_second:,.0f} a second, {plan.tokens_per_second / world:,.0f} a second and device",
            ),
            (
                "MFU",
                f"{100 * plan.mfu:.1f} % (recomputation, not counted, adds {share(recomputed, 3 * forward)} of FLOPs)",
            ),
            (
                "bubble",
                f"{share(plan.busiest.bubble_seconds, plan.simulation.makespan_seconds)} of the pipeline's time on stage "
                f"{plan.busiest_stage}, the busiest",
            ),
        ],
    )


def waits_table(plan: Plan) -> Table:
    """Where the busiest stage's step goes; the total is the step."""
    times, update = plan.busiest, plan.slowest_update
    table = new_table(
        f"Where the step goes, seconds on stage {plan.busiest_stage}",
        ["", "warm-up", "steady", "cool-down", "total", "of step"],
    )
    table.add_row(
        "compute", "", "", "", seconds(times.busy_seconds), share(times.busy_seconds, plan.step_seconds)
    )
    names = ("exposed EP all-to-all", "exposed PP messages", "exposed PCIe copies", "bubble")
    phases = (times.warmup, times.steady, times.cooldown)
    for index, name in enumerate(names):
        parts = [phase[index] for phase in phases]
        table.add_row(name, *map(seconds, parts), seconds(sum(parts)), share(sum(parts), plan.step_seconds))
    rest = (("exposed DP reduce and gather", update.data_parallel), ("optimizer update", update.update))
    for name, value in rest:
        table.add_row(name, "", "", "", seconds(value), share(value, plan.step_seconds))
    table.add_row("step", "", "", "", seconds(plan.step_seconds), share(1, 1), style="bold")
    return table


def verdict(plan: Plan, advice: Advice | None) -> list[str]:
    """Whether it fits; if not, what does not and what would help."""
    faults = problems(plan)
    if not faults:
        full, host = plan.fullest, plan.fullest_host
        return [
            f"Fits: {full.device / 1e9:.1f} of {full.capacity / 1e9:.0f} GB on the fullest device, "
            f"{host.node / 1e9:.0f} of {host.host_capacity / 1e9:.0f} GB on the fullest host."
        ]
    lines = [f"Does not fit: {fault}." for fault in faults]
    if advice is None:
        lines.append(
            "No switch of activations or optimizer states makes it fit: spread the model over more stages or expert "
            "ranks (layout.pp, layout.ep)."
        )
    else:
        lines.append(
            f"{' '.join(advice.overrides)} would make it fit: {advice.device / 1e9:.1f} GB on the fullest device, "
            f"{advice.node / 1e9:.0f} GB on the fullest host."
        )
    return lines
