"""What a step costs outside the pipeline: gradients reduced, the update, parameters gathered; and
its FLOPs.

Reduce-scatter, update and all-gather run after the last backward, one after another; nothing hides
them, and at K2's batch nothing needs to.
"""

from __future__ import annotations

from dataclasses import dataclass

from k2train.architecture.work import ELEMENT_BYTES, accumulation_bytes
from k2train.config.model import ModelConfig
from k2train.config.optim import OptimConfig
from k2train.estimate.states import StageStates
from k2train.estimate.traffic import Network, local_peers
from k2train.estimate.work import Machine
from k2train.layout.layout import Layout
from k2train.layout.weights import piece_weights


@dataclass(frozen=True)
class UpdateSeconds:
    """The end of a step on the slowest rank of a stage."""

    reduce_scatter: float
    update: float
    all_gather: float

    @property
    def data_parallel(self) -> float:
        """Communication alone."""
        return self.reduce_scatter + self.all_gather

    @property
    def total(self) -> float:
        return self.reduce_scatter + self.update + self.all_gather


def update_seconds(
    states: StageStates, layout: Layout, optim: OptimConfig, machine: Machine, copies: int = 1
) -> UpdateSeconds:
    """The update of one stage. copies: how many times a pipeline holds every parameter (2 in
    DualPipe)."""
    network, dtype = Network(machine.cluster), machine.dtype
    gpus = layout.gpus_per_node
    groups = (
        (states.dense_elements, layout.dp * copies, local_peers(layout.dp, 1, gpus)),
        (states.expert_elements, layout.edp * copies, local_peers(layout.edp, layout.ep, gpus)),
    )
    reduce = sum(
        network.ring(numbers * accumulation_bytes(dtype), size, near) for numbers, size, near in groups
    )
    gather = sum(network.ring(numbers * ELEMENT_BYTES[dtype], size, near) for numbers, size, near in groups)
    return UpdateSeconds(reduce, _owner_seconds(states, optim, machine), gather)


def _owner_seconds(states: StageStates, optim: OptimConfig, machine: Machine) -> float:
    """Matrix products (Newton-Schulz) and the elementwise update of the fullest owner."""
    products = machine.seconds(states.matmul_flops, 0.0, "matmul")
    if optim.states == "host":
        return _host_seconds(states, products, machine)
    num_elements = states.whole_elements + states.row_elements
    return products + _elementwise_seconds(num_elements, states.optimizer_bytes, machine)


def _host_seconds(states: StageStates, products: float, machine: Machine) -> float:
    """The update of states in host memory, the masters' way to the device included.

    Matrices that are updated whole cross the bus with their states, in and out at once, beside
    their update. Of parameters that are updated in rows only gradients cross it, outwards, and the
    host updates them meanwhile. What takes longest counts. Then every master crosses inwards once
    more, for the all-gather. Why: docs/decisions/0008-host-states.md.
    """
    network, width = Network(machine.cluster), accumulation_bytes(machine.dtype)
    whole, rows = states.whole_elements, states.row_elements
    device = products + _elementwise_seconds(whole, width * states.whole_numbers, machine)
    outwards = network.host_copy(width * (states.whole_numbers + rows))
    host = width * states.row_numbers_moved / machine.cluster.host_update_bytes_per_second
    return max(device, outwards, host) + network.host_copy(width * (whole + rows))


def _elementwise_seconds(num_elements: int, state_bytes: int, machine: Machine) -> float:
    """Gradient read, states read and written, the compute type's copy written, on the device."""
    moved = num_elements * (accumulation_bytes(machine.dtype) + ELEMENT_BYTES[machine.dtype])
    return machine.seconds(0.0, moved + 2.0 * state_bytes, "elementwise")


def step_flops(model: ModelConfig, seq_len: int, tokens: int) -> float:
    """FLOPs a step needs, the numerator of MFU: forward and twice that backward, causal attention,
    no recomputation."""
    embedding, layers, head = piece_weights(model, seq_len)
    return 3.0 * tokens * (embedding + sum(layers) + head)


def model_flops_utilisation(flops: float, seconds: float, world: int, peak: float) -> float:
    """Share of the devices' matrix rate that useful work took."""
    return flops / (seconds * world * peak)
