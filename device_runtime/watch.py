"""Whether this process may work now: no signal asked it to stop, and the conditions of a policy are met."""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from device_runtime.conditions import Reading, read_conditions, unmet
from device_runtime.errors import Stopped
from device_runtime.report import Report
from spafl.protocol import Policy

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Watch:
    """Listens for SIGTERM and SIGINT inside a `with`, and for conditions when asked.

    A signal only leaves a mark: training finishes its step and saves before it stops. A second one ends the process at
    once, which loses nothing that was saved.

    read       the conditions now
    interval   seconds between two readings: on a phone one takes a process
    """

    def __init__(
        self, report: Report, *, read: Callable[[], Reading] = read_conditions, interval: float = 30.0
    ) -> None:
        self._report = report
        self._read = read
        self._interval = interval
        self._next_reading = 0.0
        self._stopping = False
        self._handlers: list[Any] = []
        # a handler may write to a pipe at any time, and select sleeps on one; threading.Event could deadlock
        self._awake, self._wake = os.pipe()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handlers = [signal.signal(number, self._on_signal) for number in _SIGNALS]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        os.close(self._awake)
        os.close(self._wake)

    def stop(self) -> None:
        """Returns nothing; the work is asked to stop, as by a signal."""
        if not self._stopping:
            self._stopping = True
            os.write(self._wake, b"\0")

    def sleep(self, seconds: float) -> None:
        """Returns after `seconds`.

        Raises:
            Stopped: at once when a signal came or comes.
        """
        if select.select([self._awake], [], [], seconds)[0]:
            raise Stopped("stopped by a signal; everything done so far is saved")

    def disturbed(self, policy: Policy) -> bool:
        """Returns whether to save and `hold` now. Cheap enough to ask after every step."""
        if self._stopping or time.monotonic() < self._next_reading:
            return self._stopping
        return bool(self._unmet(policy))

    def hold(self, policy: Policy) -> None:
        """Returns once the conditions of `policy` are met.

        Raises:
            Stopped: a signal came.
        """
        told: list[str] = []
        while reasons := self._unmet(policy):
            if reasons != told:
                self._report.event("held", reasons=reasons)
                told = reasons
            self.sleep(self._interval)
        self.sleep(0)

    def _unmet(self, policy: Policy) -> list[str]:
        self._next_reading = time.monotonic() + self._interval
        return [] if policy == Policy() else unmet(policy, self._read())

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        self.stop()

    def _restore(self) -> None:
        for number, handler in zip(_SIGNALS, self._handlers, strict=False):
            signal.signal(number, handler)
        self._handlers = []
