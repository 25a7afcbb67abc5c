"""Which dispatcher takes a rank's tokens to their experts."""

from __future__ import annotations

from k2train.config.schema import Config
from k2train.device.protocol import Device
from k2train.model.dispatcher import Dispatcher, LocalDispatcher
from k2train.ops.dtypes import DTYPES
from k2train.parallel.deepep_dispatcher import DeepEPDispatcher, build_buffer, check_deepep
from k2train.parallel.dispatcher import AllToAllDispatcher
from k2train.parallel.groups import Groups
from k2train.parallel.relay_dispatcher import RelayDispatcher
from k2train.parallel.side_stream import SideStream


def build_deepep(config: Config, groups: Groups, device: Device) -> Dispatcher:
    """DeepEP's dispatcher. Every rank of the ep group must call it; raises ConfigError where it
    cannot run."""
    check_deepep(device.torch_device, DTYPES[config.train.dtype], config.model.hidden_size)
    buffer = build_buffer(groups.ep, config.model.hidden_size)
    return DeepEPDispatcher(buffer, config.model.n_routed_experts, SideStream(device))


def build_dispatcher(num_experts: int, groups: Groups, device: Device, num_parts: int = 1) -> Dispatcher:
    """The dispatcher for a rank's groups, of our own. It communicates with nobody.

    num_experts: routed experts of a layer. num_parts: `Layout.relay_parts`.
    """
    if groups.ep.size == 1:
        return LocalDispatcher(device)
    side = SideStream(device)
    if groups.relay is None:
        return AllToAllDispatcher(groups.ep, num_experts, side)
    return RelayDispatcher(groups.ep, groups.relay, groups.rail, num_experts, side, num_parts)
