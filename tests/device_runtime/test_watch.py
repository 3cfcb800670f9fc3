import os
import signal
import threading
import time

import pytest

from device_runtime.conditions import Reading
from device_runtime.errors import Stopped
from device_runtime.watch import Watch
from spafl.protocol import Policy
from tests.device_runtime.conftest import Events

COLD = Policy(max_temperature_celsius=40)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_sleep_at_once_and_marks_a_step(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with Watch(Events()) as watch:
        assert not watch.disturbed(Policy())
        timer = threading.Timer(0.1, os.kill, (os.getpid(), number))
        timer.start()
        started = time.monotonic()
        with pytest.raises(Stopped):
            watch.sleep(60)
        assert time.monotonic() - started < 30
        assert watch.disturbed(Policy())
        with pytest.raises(Stopped):
            watch.hold(Policy())
        assert signal.getsignal(number) is before  # a second one ends the process at once
    assert signal.getsignal(number) is before


def test_readings_are_taken_once_per_interval() -> None:
    readings = 0

    def read() -> Reading:
        nonlocal readings
        readings += 1
        return Reading(temperature_celsius=20)

    with Watch(Events(), read=read, interval=3600) as watch:
        assert not any(watch.disturbed(COLD) for _ in range(100))
    assert readings == 1


def test_a_policy_without_demands_takes_no_reading() -> None:
    def read() -> Reading:
        raise AssertionError("a reading costs a process on a phone")

    with Watch(Events(), read=read, interval=0) as watch:
        assert not watch.disturbed(Policy())
        watch.hold(Policy())


def test_hold_tells_each_reason_once_and_returns_when_met() -> None:
    heat = iter([50, 50, 45, 39])
    events = Events()
    with Watch(events, read=lambda: Reading(temperature_celsius=next(heat)), interval=0) as watch:
        watch.hold(COLD)
    reasons = [fields["reasons"] for fields in events.of("held")]
    assert reasons == [["at 50 °C, may have 40 °C"], ["at 45 °C, may have 40 °C"]]


def test_a_watch_in_another_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with Watch(Events()):
            seen.append(signal.getsignal(signal.SIGTERM))

    seen: list[object] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
