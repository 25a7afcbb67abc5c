"""What goes to the host comes back with equal values, geometry and sharing, and nothing is kept
that should be gone."""

from __future__ import annotations

import gc

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from k2train.activations.arena import HostArena, HostMemoryError
from k2train.activations.offload import OffloadEngine
from k2train.device.build import build_device
from k2train.device.cpu import CpuDevice, CpuStream
from k2train.device.simulated import SimulatedDevice

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class CountingStream(CpuStream):
    """Counts the bytes of each copy, and the tensors said to be in use."""

    def __init__(self, name) -> None:
        super().__init__(name)
        self.lengths = []
        self.num_uses = 0

    def copy(self, target, source) -> None:
        self.lengths.append(source.numel())
        super().copy(target, source)

    def uses(self, *tensors) -> None:
        self.num_uses += len(tensors)


class CountingDevice(CpuDevice):
    """Its streams count, and are found by name."""

    def __init__(self) -> None:
        super().__init__()
        self.streams = {}

    def stream(self, name, priority: str = "normal"):
        return self.streams.setdefault(name, CountingStream(name))


@pytest.fixture(params=["at once", "delayed"])
def engine(request: pytest.FixtureRequest):
    device = (
        CpuDevice()
        if request.param == "at once"
        else SimulatedDevice(seed=1, eager_compute=True, pages_read_once=True)
    )
    return OffloadEngine(device, HostArena(device))


def counting_engine(limit_bytes=None):
    device = CountingDevice()
    return OffloadEngine(device, HostArena(device, limit_bytes=limit_bytes))


def copied_out(engine):
    """Bytes of each copy out so far."""
    return engine.device.streams["offload"].lengths


def storage(tensor):
    return tensor.untyped_storage().data_ptr()


def test_values_sizes_and_strides_come_back_for_every_view_of_every_type(
    engine, dtype, bits, storage_of, all_views
) -> None:
    views = all_views(storage_of(torch.Generator().manual_seed(0), 1001, dtype))
    expected = [(bits(v), v.shape, v.stride(), v.dtype) for v in views]
    offloaded = engine.offload(views)
    offloaded.reload()
    back = offloaded.tensors()
    assert [(bits(v), v.shape, v.stride(), v.dtype) for v in back] == expected
    assert len({storage(v) for v in back if v.numel()}) == 1
    assert storage(back[0]) != storage(views[0])


def test_tensors_that_share_a_storage_are_copied_once_and_share_one_again() -> None:
    engine = counting_engine()
    base = torch.randn(64, 64)
    other = torch.randn(100)
    offloaded = engine.offload([base, base.t(), base[3:5], other, base.view(-1), base])
    assert copied_out(engine) == [64 * 64 * 4, 400]
    assert engine.bytes_out == 64 * 64 * 4 + 400
    offloaded.reload()
    back = offloaded.tensors()
    back[0].zero_()
    assert [bool((t == 0).all()) for t in back] == [True, True, True, False, True, True]


def test_bytes_that_no_view_reaches_stay_behind_and_the_views_still_share_a_storage() -> None:
    """Columns 0 to 1023 and 3072 to 4095 of a row: what lies between is neither copied nor
    allocated again."""
    engine = counting_engine()
    row = torch.arange(4096, dtype=torch.float32)
    left, right = row[:1024], row[3072:]
    offloaded = engine.offload([right, left])
    assert copied_out(engine) == [4096, 4096]
    assert offloaded.host_bytes == engine.bytes_out == 8192
    offloaded.reload()
    right_back, left_back = offloaded.tensors()
    assert torch.equal(right_back, right)
    assert torch.equal(left_back, left)
    assert storage(right_back) == storage(left_back)
    assert right_back.untyped_storage().nbytes() == 8192


@pytest.mark.parametrize("start", [0, 1, 4, 63, 64, 65, 1000])
def test_a_tensor_is_as_aligned_in_its_storage_as_it_was(engine, start: int) -> None:
    tensor = torch.arange(4096, dtype=torch.float32)[start : start + 7]
    offloaded = engine.offload([tensor])
    offloaded.reload()
    (back,) = offloaded.tensors()
    assert torch.equal(back, tensor)
    assert back.storage_offset() % 64 == tensor.storage_offset() % 64


def test_groups_with_no_tensors_or_no_elements_are_legal(engine) -> None:
    empty = [torch.empty(0), torch.empty(3, 0, 2, dtype=torch.int64), torch.empty(2, 4)[:, 4:]]
    for group in ([], empty):
        offloaded = engine.offload(group)
        offloaded.reload()
        back = offloaded.tensors()
        assert [(t.shape, t.stride(), t.dtype) for t in back] == [
            (t.shape, t.stride(), t.dtype) for t in group
        ]
    assert engine.bytes_out == engine.arena.peak_bytes == 0


def test_a_tensor_that_needs_a_gradient_comes_back_without_its_graph(engine) -> None:
    leaf = torch.randn(5, requires_grad=True)
    offloaded = engine.offload([leaf, leaf * 2])
    offloaded.reload()
    back = offloaded.tensors()
    assert torch.equal(back[0], leaf)
    assert not any(t.requires_grad for t in back)


def test_only_plain_tensors_of_the_engines_device_are_taken(engine) -> None:
    with pytest.raises(AssertionError, match="not on cpu"):
        engine.offload([torch.empty(3, device="meta")])
    with pytest.raises(AssertionError, match="conjugation"):
        engine.offload([torch.ones(2, dtype=torch.complex64).conj()])
    with pytest.raises(AssertionError, match="strided"):
        engine.offload([torch.eye(3).to_sparse()])


def test_reading_before_the_reload_and_other_misuse_is_named(engine) -> None:
    offloaded = engine.offload([torch.ones(3)])
    with pytest.raises(AssertionError, match="before their RELOAD"):
        offloaded.tensors()
    offloaded.reload()
    with pytest.raises(AssertionError, match="second RELOAD"):
        offloaded.reload()
    assert offloaded.tensors() is offloaded.tensors()
    with pytest.raises(AssertionError, match="second RELOAD"):
        offloaded.reload()
    offloaded.drop()
    offloaded.drop()
    with pytest.raises(AssertionError, match="after they were dropped"):
        offloaded.tensors()
    with pytest.raises(AssertionError, match="that were dropped"):
        offloaded.reload()


@pytest.mark.parametrize("state", ["out", "back", "read"])
@pytest.mark.parametrize("way", ["drop", "collect"])
def test_whatever_its_state_one_that_is_dropped_or_collected_returns_its_buffers_and_frees_its_tensors(
    engine, state: str, way: str
) -> None:
    offloaded = engine.offload([torch.randn(1000), torch.randn(300)])
    held = []
    if state != "out":
        offloaded.reload()
    if state == "read":
        held = [StorageWeakRef(t.untyped_storage()) for t in offloaded.tensors()]
    if way == "drop":
        offloaded.drop()
    else:
        del offloaded
    assert engine.arena.used_bytes == engine.in_flight_bytes == 0
    assert all(storage.expired() for storage in held)
    allocated = engine.arena.allocated_bytes
    again = engine.offload([torch.randn(1000), torch.randn(300)])
    assert engine.arena.allocated_bytes == allocated
    again.drop()


def test_a_cycle_that_holds_one_is_collected_with_its_buffers(engine) -> None:
    cycle = [engine.offload([torch.ones(100)])]
    cycle.append(cycle)
    del cycle
    assert engine.arena.used_bytes > 0
    gc.collect()
    assert engine.arena.used_bytes == 0


def test_device_memory_is_let_go_of_explicitly_only_when_nobody_waited_for_its_copy() -> None:
    engine = counting_engine()
    back = engine.device.streams["reload"]
    for read, way, expected in [(True, "drop", 0), (False, "drop", 2), (True, "", 0), (False, "", 2)]:
        back.num_uses = 0
        offloaded = engine.offload([torch.ones(3), torch.ones(4)])
        offloaded.reload()
        if read:
            offloaded.tensors()
        if way == "drop":
            offloaded.drop()
        del offloaded
        assert back.num_uses == expected


def test_nothing_keeps_what_was_copied_out(engine) -> None:
    tensors = [torch.randn(1000), torch.randn(30, 30).t()]
    storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
    offloaded = engine.offload(tensors)
    del tensors
    if isinstance(engine.device, SimulatedDevice):
        assert not any(s.expired() for s in storages)
        engine.device.synchronize()
    assert all(s.expired() for s in storages)
    offloaded.drop()


def test_what_was_read_is_freed_with_the_callers_last_reference(engine) -> None:
    offloaded = engine.offload([torch.randn(1000)])
    offloaded.reload()
    tensors = offloaded.tensors()
    storages = [StorageWeakRef(t.untyped_storage()) for t in tensors]
    del offloaded
    assert not any(s.expired() for s in storages)
    del tensors
    assert all(s.expired() for s in storages)


def test_an_arena_that_runs_out_leaves_everything_as_it_was() -> None:
    engine = counting_engine(limit_bytes=8192)
    first = engine.offload([torch.ones(1024)])
    with pytest.raises(HostMemoryError):
        engine.offload([torch.ones(512), torch.ones(1024)])
    assert engine.arena.used_bytes == engine.in_flight_bytes == engine.bytes_out == 4096
    assert len(copied_out(engine)) == 1
    first.reload()
    assert torch.equal(first.tensors()[0], torch.ones(1024))


def test_counters_tell_what_went_out_came_back_and_is_on_the_host(engine) -> None:
    first = engine.offload([torch.ones(100), torch.ones(50)])
    second = engine.offload([torch.ones(10)])
    assert (engine.bytes_out, engine.bytes_back, engine.in_flight_bytes) == (640, 0, 640)
    first.reload()
    assert (engine.bytes_out, engine.bytes_back, engine.in_flight_bytes) == (640, 600, 40)
    engine.reset_counters()
    assert (engine.bytes_out, engine.bytes_back, engine.in_flight_bytes) == (0, 0, 40)
    second.drop()
    assert engine.in_flight_bytes == 0


def test_copy_seconds_add_up_by_direction_and_tell_the_exposed_part() -> None:
    """In simulated time every queued item takes one tick, so a copy lasts at least one and the sums
    are whole numbers."""
    device = SimulatedDevice(seed=0, eager_compute=False)
    engine = OffloadEngine(device, HostArena(device), timed=True)
    groups = [engine.offload([torch.ones(10), torch.ones(10)]) for _ in range(3)]
    assert engine.copy_seconds().out >= 3 * 3
    assert engine.copy_seconds().back == engine.copy_seconds().exposed == 0
    for offloaded in groups:
        offloaded.reload()
        offloaded.tensors()
    seconds = engine.copy_seconds()
    assert seconds.back >= 3 * 3
    assert seconds.exposed > 0
    engine.reset_counters()
    assert engine.copy_seconds().out == 0


def test_an_engine_that_is_not_timed_refuses_to_report_times(engine) -> None:
    with pytest.raises(AssertionError, match="timed=True"):
        engine.copy_seconds()


@pytest.mark.gpu
@gpu
def test_a_gpu_round_trip_is_exact_while_compute_goes_on(dtype, bits, storage_of, all_views) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    timed = build_device(device, timed=True)
    engine = OffloadEngine(timed, HostArena(timed), timed=True)
    flat = storage_of(torch.Generator().manual_seed(0), 3_000_001, dtype)
    expected = [bits(v) for v in all_views(flat)]
    work = torch.randn(2048, 2048, device=device)
    for _ in range(20):
        offloaded = engine.offload(all_views(flat.to(device)))
        work = torch.tanh(work @ work)
        offloaded.reload()
        work = torch.tanh(work @ work)
        assert [bits(v.cpu()) for v in offloaded.tensors()] == expected
    assert engine.copy_seconds().out > 0
    assert engine.arena.used_bytes == 0


@pytest.mark.gpu
@gpu
def test_a_gpu_frees_what_was_copied_out() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    engine = OffloadEngine(build_device(device), HostArena(build_device(device)))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    offloaded = engine.offload([torch.randn(1 << 20, device=device)])
    torch.cuda.synchronize()
    torch.empty(1, device=device)  # the allocator looks at its events when it is asked for memory
    assert torch.cuda.memory_allocated() <= before + 512
    offloaded.reload()
    offloaded.drop()
