"""What the plan says of each measured thing: k2train.estimate's formulas with the device's cluster
file.

None stands wherever there is no prediction: for a device without a cluster file, or for what the
plan does not know. FLOPs, bytes and seconds throughout.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from typing import Literal

from k2train.architecture.layer import mixer_of
from k2train.config.convert import to_dict
from k2train.config.schema import Config
from k2train.config.sections import ClusterConfig, Dtype
from k2train.estimate.layer_costs import LayerCosts
from k2train.estimate.step import step_flops
from k2train.estimate.virtual_stage import Estimator, build_estimator
from k2train.estimate.work import Machine
from k2train.layout.build import build_layout
from k2train.planner.plan import build_plan
from k2train.update_rules.rules.muon import newton_schulz_cost


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The plan's seconds for one device."""

    cluster: ClusterConfig | None

    def seconds(
        self,
        flops: float,
        num_bytes: float = 0.0,
        kind: Literal["matmul", "attention", "elementwise"] = "matmul",
        dtype: Dtype = "bfloat16",
    ) -> float | None:
        """One kernel by the roofline."""
        return None if self.cluster is None else Machine(self.cluster, dtype).seconds(flops, num_bytes, kind)

    def rate(
        self,
        flops: float,
        num_bytes: float = 0.0,
        kind: Literal["matmul", "attention"] = "matmul",
        dtype: Dtype = "bfloat16",
    ) -> float | None:
        """TFLOP/s of one kernel."""
        seconds = self.seconds(flops, num_bytes, kind, dtype)
        return None if seconds is None else flops / seconds / 1e12

    @property
    def memory_bandwidth(self) -> float | None:
        """Bytes a second read and written."""
        cluster = self.cluster
        return None if cluster is None else cluster.memory_bytes_per_second * cluster.memory_efficiency

    @property
    def bus_bandwidth(self) -> float | None:
        """Bytes a second over the host link, one direction."""
        cluster = self.cluster
        return None if cluster is None else cluster.host_link_bytes_per_second * cluster.host_link_efficiency


def estimator(config: Config) -> Estimator:
    """The costs of the layers of a config on its cluster."""
    layout = build_layout(config.layout, config.cluster, config.model, config.train.seq_len)
    return build_estimator(config.model, config.train, config.activations, layout, config.cluster)


def plan_peak(costs: LayerCosts) -> int:
    """The plan's bound on the bytes of one layer's forward, backward and weight gradients."""
    saved = sum(tensor.device_bytes for tensor in costs.saved)
    transient = max(costs.forward_transient_bytes, costs.backward_transient_bytes)
    return saved + transient + costs.weight_queue_bytes


def rehearsed_peak(config: Config, most_seconds: float) -> float:
    """Bytes at the peak of a rehearsed step of `config`, states and all. Raises RuntimeError where
    it cannot be rehearsed."""
    on_cuda = dataclasses.replace(config, train=dataclasses.replace(config.train, device="cuda"))
    command = [sys.executable, "-m", f"{__package__}.rehearse_peak"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    # Kernels are passed over in a rehearsal; interpreted ones would run.
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        command,
        input=json.dumps(to_dict(on_cuda)),
        capture_output=True,
        text=True,
        check=False,
        timeout=most_seconds,
        env=environment,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return float(done.stdout)


def step_prediction(config: Config) -> tuple[float, float]:
    """(tokens a second, model FLOPs utilisation) of a step by the plan."""
    plan = build_plan(config)
    return plan.tokens_per_second, plan.mfu


def useful_attention_flops(config: Config, length: int) -> tuple[float, float]:
    """FLOPs of one causal sequence, forward and backward: two products, and the five that a
    backward cannot do without.

    A kernel that does seven is charged five, as all are, so that rates compare times.
    """
    heads = mixer_of(config.model).heads
    forward = length * heads.score_flops(length)
    query, value = heads.query, heads.value
    return forward, forward * (3 * query + 2 * value) / (query + value)


def newton_schulz_flops(shape: tuple[int, int], steps: int) -> float:
    return float(newton_schulz_cost(shape, steps))


def train_flops(config: Config, tokens: int) -> float:
    """FLOPs of training on so many tokens: MFU's numerator."""
    return step_flops(config.model, config.train.seq_len, tokens)
