"""Messages between pipeline stages: (rows, hidden) activations forward, gradients back.

NCCL has no tags: what one stage sends to another arrives in the order it was sent in, whatever it
means. The schedule's validator has proved that both ends agree on that order, so nothing is tagged
here. Each ordered pair of stages has a channel of its own (`channels.py`). Receives are posted
where the action list says, ahead of their use.

A sent tensor is kept until its message has left. On a GPU the host runs ahead of the device, as far
as it likes: a send that the host has issued may be hundreds of microbatches away from leaving, and
its tensor would be kept as long. So no more than `Channels.max_sends` messages to one stage are
under way. The next send first waits for the oldest, and on CUDA that wait is the stream's that
messages leave from: the host goes on, and the memory comes back when that stream has passed it.
Where the schedule's steps take equally long the wait never finds a message that has not left
(`Messages.max_sends`).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator

import torch

from k2train.parallel.channels import Channels
from k2train.parallel.communicator import Work


@dataclasses.dataclass(frozen=True)
class Receiving:
    """A posted receive. It holds the only reference to its tensor."""

    work: Work
    tensor: torch.Tensor

    def wait(self) -> torch.Tensor:
        """The tensor, once it has arrived."""
        self.work.wait()
        return self.tensor


class PipelineTransport:
    """Point-to-point messages of one rank over its channels. Implements runtime.stage.Transport."""

    def __init__(
        self, channels: Channels, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.channels, self.hidden_size, self.dtype, self.device = channels, hidden_size, dtype, device
        self._under_way: dict[int, collections.deque[tuple[Work, torch.Tensor]]] = {
            stage: collections.deque() for stage in channels.outgoing
        }

    def send(self, tensor: torch.Tensor, stage: int) -> None:
        """Start sending to `stage`; its receive of the same place in their common order must be
        posted sometime."""
        self._release()
        under_way = self._under_way[stage]
        while len(under_way) >= self.channels.max_sends:
            self._wait_for_oldest(under_way)
        tensor = tensor.contiguous()
        under_way.append((self.channels.outgoing[stage].start_send(tensor), tensor))

    def receive(self, num_rows: int, stage: int) -> Receiving:
        """Post the receive of a (num_rows, hidden) tensor from `stage`."""
        self._release()
        tensor = torch.empty(num_rows, self.hidden_size, dtype=self.dtype, device=self.device)
        return Receiving(self.channels.incoming[stage].start_recv(tensor), tensor)

    def finish(self) -> None:
        """Wait for every send; a stage calls it at the end of its list."""
        for under_way in self._under_way.values():
            while under_way:
                self._wait_for_oldest(under_way)

    def tensors(self) -> Iterator[torch.Tensor]:
        """What is kept because it may not have left."""
        for under_way in self._under_way.values():
            yield from (tensor for _, tensor in under_way)

    def abandon(self) -> None:
        """Let go of what an interrupted step has sent, without waiting for it."""
        for under_way in self._under_way.values():
            under_way.clear()

    def _release(self) -> None:
        """Let go of messages that have left, without waiting for any that has not."""
        for under_way in self._under_way.values():
            while under_way and under_way[0][0].done():
                self._wait_for_oldest(under_way)

    def _wait_for_oldest(self, under_way: collections.deque[tuple[Work, torch.Tensor]]) -> None:
        # torch keeps the tensor of an asynchronous operation over NCCL until its `wait()`, whether
        # or not it has ended.
        under_way.popleft()[0].wait()
