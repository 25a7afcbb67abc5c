"""Messages between pipeline stages: (rows, hidden) activations forward, gradients back.

NCCL has no tags: between two ranks messages arrive in the order they were sent in, whatever they mean. The schedule's
validator has proved that every ordered pair of stages sends and receives in one order, so nothing is tagged here.
Receives are posted where the action list says, ahead of their use; sends are asynchronous and keep their tensor alive.
"""

from __future__ import annotations

import collections
import dataclasses

import torch

from k2train.parallel.communicator import Communicator, Work


@dataclasses.dataclass(frozen=True)
class Receiving:
    """A posted receive."""

    work: Work
    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        """The tensor, once it has arrived."""
        self.work.wait()
        return self.tensor


class PipelineTransport:
    """Point-to-point messages over a pp group, whose ranks are the stages. Implements runtime.stage.Transport."""

    def __init__(
        self, group: Communicator, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.group, self.hidden_size, self.dtype, self.device = group, hidden_size, dtype, device
        self._sending: collections.deque[tuple[Work, torch.Tensor]] = collections.deque()

    def send(self, tensor: torch.Tensor, stage: int) -> None:
        """Start sending to `stage`; its receive of the same place in their common order must be posted sometime."""
        tensor = tensor.contiguous()
        self._sending.append((self.group.start_send(tensor, stage), tensor))

    def receive(self, num_rows: int, stage: int) -> Receiving:
        """Post the receive of a (num_rows, hidden) tensor from `stage`."""
        tensor = torch.empty(num_rows, self.hidden_size, dtype=self.dtype, device=self.device)
        return Receiving(self.group.start_recv(tensor, stage), tensor)

    def finish(self) -> None:
        """Wait for every send; a stage calls it at the end of its list."""
        while self._sending:
            work, _ = self._sending.popleft()
            work.wait()
