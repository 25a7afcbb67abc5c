"""The sections that say where and how a model is trained: layout, schedule, activations, cluster,
train, plan.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from k2train.config.errors import ConfigError
from k2train.config.fields import check_ranges, key

ScheduleKind = Literal["k2", "gpipe", "1f1b", "interleaved_1f1b", "zb_h1", "dualpipe", "dualpipe_v"]
Policy = Literal["keep", "fp8", "recompute", "offload", "fp8_offload"]
FP8_POLICIES: tuple[Policy, ...] = ("fp8", "fp8_offload")
OFFLOAD_POLICIES: tuple[Policy, ...] = ("offload", "fp8_offload")
Dtype = Literal["bfloat16", "float32", "float64"]
DispatchKind = Literal["per_expert", "per_rank", "per_node", "deepep"]


@dataclasses.dataclass(frozen=True)
class LayoutConfig:
    """`layout`: how many ranks stand in each direction; world = pp * edp * ep."""

    pp: int = key("pipeline stages", default=1, unit="ranks", minimum=1)
    ep: int = key("ranks the experts of a layer are spread over", default=1, unit="ranks", minimum=1)
    edp: int | None = key(
        "replicas of every expert; null derives it from layout.nodes, or 1",
        default=None,
        unit="ranks",
        minimum=1,
    )
    vpp: int = key(
        "virtual stages (chunks of layers) on each pipeline stage",
        default=1,
        unit="virtual stages",
        minimum=1,
    )
    nodes: int | None = key(
        "machines; null derives it from pp, edp and ep", default=None, unit="nodes", minimum=1
    )
    layers_per_virtual_stage: tuple[int, ...] | None = key(
        "transformer layers on each virtual stage in pipeline order; null balances them by cost",
        default=None,
        unit="layers",
    )
    dispatch: DispatchKind = key(
        "how often a token is sent on its way to the experts: once for every expert it chose, once for every rank that holds "
        "one, or once for every node that does and there once for every rank; deepep is the last by DeepEP's kernels, where "
        "that package is installed (not yet run on a GPU)",
        default="per_expert",
    )
    dispatch_parts: int = key(
        "parts that a microbatch's tokens are sent in with dispatch=per_node, so that one travels between nodes while "
        "another is passed on inside them; without effect where there is one hop",
        default=1,
        unit="parts",
        minimum=1,
    )

    def __post_init__(self) -> None:
        check_ranges("layout", self)

    def known_data_ranks(self, gpus_per_node: int) -> int:
        """The data-parallel ranks that the section itself says; a launcher may add replicas where
        it names none.
        """
        replicas = self.edp or 1
        if self.nodes is not None:
            replicas = max(1, self.nodes * gpus_per_node // (self.pp * self.ep))
        return self.ep * replicas


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """`schedule`: the order of forward and backward actions, and the passes switched on."""

    kind: ScheduleKind = key("base order of the pipeline", default="interleaved_1f1b")
    extra_warmup_microbatches: int = key(
        "warm-up microbatches beyond the base order's", default=0, unit="microbatches", minimum=0
    )
    pair_forward_backward: bool = key(
        "run a forward and a backward together, one's all-to-all under the other's compute", default=False
    )
    split_weight_grad: bool = key(
        "take weight gradients out of the backward and put them beside the pipeline's sends", default=False
    )
    prefetch_depth: int = key(
        "how many microbatches ahead an offloaded activation is reloaded",
        default=1,
        unit="microbatches",
        minimum=1,
    )

    def __post_init__(self) -> None:
        check_ranges("schedule", self)
        check_pairs_are_split(self.pair_forward_backward, self.split_weight_grad)


def check_pairs_are_split(pair_forward_backward: bool, split_weight_grad: bool) -> None:
    """A pair has no room for the weight gradient, so it must be split off. Raises ConfigError."""
    if pair_forward_backward and not split_weight_grad:
        raise ConfigError(
            "schedule.pair_forward_backward",
            True,
            "a pair runs the input gradient only",
            "set schedule.split_weight_grad=true as well",
        )


@dataclasses.dataclass(frozen=True)
class ActivationsConfig:
    """`activations`: what happens to each saved tensor between forward and backward.

    Policies: keep it on the device; store it as FP8 (E4M3, 1 x 128 tiles); drop and recompute it;
    offload it to host memory; or FP8 first and then offload. Names are per layer; docs/memory.md
    lists what each tensor is.
    """

    layer_input: Policy = key("residual stream entering the layer, input of its first norm", default="keep")
    input_norm_output: Policy = key("normed input of the attention projections", default="keep")
    q_latent: Policy = key("query latent before its norm", default="keep")
    q_latent_norm_output: Policy = key("query latent after its norm", default="keep")
    kv_latent: Policy = key("key-value latent and rotary key before the norm", default="keep")
    kv_latent_norm_output: Policy = key("key-value latent after its norm", default="keep")
    query: Policy = key("queries (MLA up-projection)", default="keep")
    key_value: Policy = key("keys and values (MLA up-projection)", default="keep")
    attention_output: Policy = key("attention output, input of the output projection", default="keep")
    attention_residual: Policy = key(
        "residual stream after attention, input of the second norm", default="keep"
    )
    post_norm_output: Policy = key("normed input of router, experts and feed-forward", default="keep")
    routing: Policy = key("router scores, chosen experts, weights and permutation", default="keep")
    expert_input: Policy = key("tokens gathered at their routed experts", default="keep")
    swiglu_input: Policy = key("gate and up projections of the routed experts", default="keep")
    swiglu_output: Policy = key(
        "input of the routed experts' down-projection, times routing weights", default="keep"
    )
    shared_swiglu_input: Policy = key("gate and up projections of the shared experts", default="keep")
    shared_swiglu_output: Policy = key("input of the shared experts' down-projection", default="keep")
    mlp_swiglu_input: Policy = key("gate and up projections of a dense layer", default="keep")
    mlp_swiglu_output: Policy = key("input of a dense layer's down-projection", default="keep")

    @property
    def offloads(self) -> bool:
        """Whether any name goes to host memory."""
        return any(policy in OFFLOAD_POLICIES for policy in dataclasses.asdict(self).values())


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """`cluster`: what the machine can do.

    Rates are one device's and one direction's; sources stand in configs/cluster.
    """

    name: str = key("name shown in reports")
    gpus_per_node: int = key("devices in a node", unit="devices", minimum=1)
    matmul_flops_per_second: float = key("dense BF16 matrix rate", unit="FLOP/s", above=0)
    matmul_efficiency: float = key("share of the matrix rate that large products reach", above=0, maximum=1)
    attention_efficiency: float = key(
        "share of the matrix rate that fused attention reaches", above=0, maximum=1
    )
    memory_bytes_per_second: float = key("device memory bandwidth", unit="bytes/s", above=0)
    memory_efficiency: float = key(
        "share of the memory bandwidth that elementwise kernels reach", above=0, maximum=1
    )
    intranode_bytes_per_second: float = key(
        "device-to-device bandwidth inside a node", unit="bytes/s", above=0
    )
    internode_bytes_per_second: float = key("network bandwidth between nodes", unit="bytes/s", above=0)
    intranode_efficiency: float = key(
        "share of the rate inside a node that collectives reach", above=0, maximum=1
    )
    internode_efficiency: float = key(
        "share of the rate between nodes that collectives reach", above=0, maximum=1
    )
    host_link_bytes_per_second: float = key("device-to-host bandwidth", unit="bytes/s", above=0)
    host_link_efficiency: float = key("share of the host link that pinned copies reach", above=0, maximum=1)
    kernel_latency_seconds: float = key("fixed cost of a kernel", unit="seconds", minimum=0)
    intranode_latency_seconds: float = key("fixed cost of a message inside a node", unit="seconds", minimum=0)
    internode_latency_seconds: float = key("fixed cost of a message between nodes", unit="seconds", minimum=0)
    device_memory_bytes: float = key("memory of a device", unit="bytes", above=0)
    host_memory_bytes: float = key("memory of a node's host", unit="bytes", above=0)
    kind: Literal["gpu", "cpu"] = key("what its devices are", default="gpu")
    reserved_device_bytes: float = key(
        "device memory taken by the driver, libraries and fragmentation", unit="bytes", default=0.0, minimum=0
    )
    # docs/optimizer.md: 50 M parameters in 50 ms on one core, seven FP32 numbers read or written
    # for each.
    host_update_bytes_per_second: float = key(
        "host memory that one rank's AdamW reads and writes, where its states live there",
        unit="bytes/s",
        default=28.0e9,
        above=0,
    )
    # Assumption: a copy into pinned memory, the wake-up of the host, and the launch of a first
    # kernel, some 10 us each.
    host_read_seconds: float = key(
        "from numbers on the device until the host has read them and its next kernel starts",
        unit="seconds",
        default=3.0e-5,
        minimum=0,
    )

    def __post_init__(self) -> None:
        check_ranges("cluster", self)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`train`: the size of a step, how many, and what happens between them."""

    steps: int = key(
        "optimizer steps; in a config file or on the command line also `phases`, as many as optim.lr_phases last",
        unit="steps",
        default=100,
        minimum=1,
    )
    seed: int = key("seed of the initial weights and of the data order", default=0, minimum=0)
    global_batch_tokens: int = key("tokens in a step over all ranks", unit="tokens", default=8192, minimum=1)
    seq_len: int = key("tokens in a sequence", unit="tokens", default=256, minimum=2)
    microbatch_size: int = key("sequences in a microbatch", unit="sequences", default=4, minimum=1)
    dtype: Dtype = key("compute type of parameters and activations", default="float32")
    device: Literal["auto", "cpu", "cuda"] = key(
        "where tensors live; auto takes a GPU where there is one", default="auto"
    )
    grad_clip_norm: float | None = key("largest global gradient norm; null never clips", default=1.0, above=0)
    balance_loss_alpha: float = key("weight of the sequence-wise balance loss", default=1e-4, minimum=0)
    bias_update_rate: float = key("step of the aux-loss-free correction bias", default=1e-3, minimum=0)
    eval_every_steps: int = key(
        "steps between evaluations; 0 evaluates at the end only", unit="steps", default=0, minimum=0
    )
    eval_tokens: int = key(
        "held-out tokens of an evaluation during the run; the last one uses final_eval_tokens",
        unit="tokens",
        default=32768,
        minimum=0,
    )
    final_eval_tokens: int = key(
        "held-out tokens of the last evaluation; 0 switches it off", unit="tokens", default=262144, minimum=0
    )
    eval_microbatch_size: int | None = key(
        "sequences in a microbatch of an evaluation, which keeps nothing for a backward; null takes microbatch_size",
        unit="sequences",
        default=None,
        minimum=1,
    )
    eval_overlap: float = key(
        "share of an evaluation window that the window before it scored: what follows is scored "
        "with that much text before it; 0 lays windows end to end",
        default=0.0,
        minimum=0,
    )
    checkpoint_every_steps: int = key(
        "steps between checkpoints; 0 writes one at the end only", unit="steps", default=0, minimum=0
    )
    checkpoint_every_minutes: float = key(
        "minutes between checkpoints, by the clock of rank 0, after the step in hand; 0 goes by steps alone",
        unit="minutes",
        default=0.0,
        minimum=0,
    )
    keep_checkpoints: int = key("newest checkpoints kept on disk", default=2, minimum=1)
    timeout_seconds: float = key(
        "how long a collective may take before the run is given up; joining at the start has two minutes at least",
        unit="seconds",
        default=600.0,
        above=0,
    )
    bind_cores: bool = key(
        "give each process of a launcher its own share of the cores, on GPUs of those of its GPU's NUMA node (Linux)",
        default=True,
    )
    init_from: str | None = key(
        "checkpoint directory whose weights start the run, written by import-hf or train", default=None
    )

    def __post_init__(self) -> None:
        check_ranges("train", self)
        if self.eval_overlap >= 1:
            raise ConfigError(
                "train.eval_overlap",
                self.eval_overlap,
                "a window must score some of its tokens",
                "give a share below 1, for example 0.25",
            )

    @property
    def eval_overlap_tokens(self) -> int:
        """Tokens that a window of evaluation shares with the one before it."""
        return int(self.eval_overlap * self.seq_len)


@dataclasses.dataclass(frozen=True)
class TelemetryConfig:
    """`telemetry`: where metrics go besides metrics.jsonl."""

    tensorboard: bool = key("write TensorBoard files into the run directory", default=True)
    wandb_project: str | None = key(
        "Weights & Biases project (needs the wandb extra); null for none", default=None
    )
    progress: Literal["auto", "bar", "lines", "none"] = key(
        "progress display; auto draws a bar on a terminal", default="auto"
    )
    log_first_steps: int = key(
        "steps at the start of a run with a line of progress each", default=10, unit="steps", minimum=0
    )
    log_every_seconds: float = key(
        "longest time without a line of progress, counted at the end of steps",
        default=60.0,
        unit="seconds",
        above=0,
    )
    log_every_steps: int | None = key(
        "most steps without a line of progress; null takes a fortieth of the run",
        default=None,
        unit="steps",
        minimum=1,
    )
    trace_step: int | None = key(
        "step whose execution is recorded into run_dir/trace.json (open it in Perfetto, beside plan.trace); null for none",
        default=None,
        minimum=1,
    )

    def __post_init__(self) -> None:
        check_ranges("telemetry", self)


@dataclasses.dataclass(frozen=True)
class RehearseConfig:
    """`rehearse`: which rank `k2train rehearse` runs, and what it writes."""

    stage: int = key("stage of the pipeline whose rank is rehearsed, from 0", default=0, minimum=0)
    data_rank: int = key(
        "which of the stage's ranks, from 0 to layout.edp * layout.ep - 1", default=0, minimum=0
    )
    microbatches: int | None = key(
        "microbatches of the rehearsed step; null takes the whole batch",
        unit="microbatches",
        default=None,
        minimum=1,
    )
    skew: float = key(
        "how unevenly experts are chosen: deviation of the logarithm of an expert's popularity, 0 for chance alone",
        default=0.0,
        minimum=0.0,
    )
    json: str | None = key("file for the machine-readable report", default=None)
    picture: str | None = key("PNG file for memory over the step, planned and rehearsed", default=None)

    def __post_init__(self) -> None:
        check_ranges("rehearse", self)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """`plan`: what `k2train plan` writes besides its tables."""

    json: str | None = key("file for the machine-readable plan", default=None)
    timeline: str | None = key("PNG file for the timeline picture", default=None)
    trace: str | None = key("JSON file for the trace, to open in Perfetto", default=None)
    compare: tuple[ScheduleKind, ...] = key("schedule kinds to put side by side", default=())
