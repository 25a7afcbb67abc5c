"""The host waits for the device where it would run too far ahead, and only there."""

from __future__ import annotations

import pytest

from k2train.device.cpu import CpuDevice, CpuEvent, CpuStream
from k2train.runtime.pace import STEPS_AHEAD, Pace


class Numbered(CpuEvent):
    def __init__(self, number: int, waited: list[int]) -> None:
        super().__init__()
        self.number, self.waited = number, waited

    def wait_host(self) -> None:
        self.waited.append(self.number)


class NumberingDevice(CpuDevice):
    """Numbers the events of its main stream and notes which of them the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.recorded = 0
        self.waited: list[int] = []

    @property
    def current(self) -> CpuStream:
        device = self

        class Main(CpuStream):
            def record(self) -> CpuEvent:
                device.recorded += 1
                return Numbered(device.recorded - 1, device.waited)

        return Main("main")


@pytest.mark.parametrize("num_steps", [0, 1, STEPS_AHEAD, STEPS_AHEAD + 1, 9])
def test_a_step_begins_when_the_one_two_before_has_ended(num_steps) -> None:
    device = NumberingDevice()
    pace = Pace(device)
    for step in range(num_steps):
        with pace.step():
            assert device.waited == list(range(step - STEPS_AHEAD + 1))
    assert device.recorded == num_steps


def test_an_interrupted_step_is_not_waited_for() -> None:
    device = NumberingDevice()
    pace = Pace(device)
    with pytest.raises(ValueError, match="in the middle"), pace.step():
        raise ValueError("in the middle")
    for _ in range(STEPS_AHEAD + 1):
        with pace.step():
            pass
    assert device.waited == [0]
