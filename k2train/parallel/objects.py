"""Small plain values (what JSON can hold) from one rank to its group: paths, decisions,
messages."""

from __future__ import annotations

import json
from typing import Any

import torch

from k2train.parallel.communicator import Communicator


def broadcast_object(group: Communicator, value: Any, root: int, device: torch.device) -> Any:
    """The root's `value` on every rank; what the others pass is ignored. Two broadcasts, called by
    every rank."""
    payload = json.dumps(value).encode() if group.rank == root else b""
    length = torch.tensor([len(payload)], dtype=torch.int64, device=device)
    group.broadcast(length, root)
    text = torch.zeros(int(length.item()), dtype=torch.uint8, device=device)
    if group.rank == root:
        text = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(device)
    group.broadcast(text, root)
    return json.loads(bytes(text.tolist()))
