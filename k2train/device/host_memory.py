"""Where host memory comes from: ordinary, or locked in place so that copy engines can read and
write it by themselves.

torch's own pinned allocator rounds every request up to a power of two and keeps what is freed: with
it, three eighths of the host memory of a run could stand empty and none of it ever return. So
locked memory is made here from whole pages of the exact size and registered with CUDA, which comes
to the same for a copy. Sizes are bytes.
"""

from __future__ import annotations

import mmap
import weakref

import torch


class PageableMemory:
    """Memory of the ordinary allocator."""

    def __init__(self, num_bytes: int) -> None:
        self.bytes = torch.zeros(num_bytes, dtype=torch.uint8)


class PinnedMemory:
    """Whole pages, registered with CUDA. Raises OSError or torch.cuda.CudaError where the system
    refuses.

    They are unregistered before they are unmapped: the finaliser holds the mapping. It waits for
    the device first, as a copy that was queued may still be under way; memory is freed between
    steps or where the arena is at its limit, so this wait is rare. The process's end needs no
    unregistering.
    """

    def __init__(self, num_bytes: int) -> None:
        # Shared, not copy-on-write: a fork must not move what a copy engine writes.
        pages = mmap.mmap(-1, num_bytes)
        self.bytes = torch.frombuffer(pages, dtype=torch.uint8)
        address = self.bytes.data_ptr()
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, num_bytes, 0))
        device = torch.cuda.current_device()  # another thread's may differ where the finaliser runs
        weakref.finalize(self, _unregister, pages, address, device).atexit = False


def _unregister(pages: mmap.mmap, address: int, device: int) -> None:
    torch.cuda.synchronize(device)
    torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
