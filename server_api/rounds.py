"""The round machine: what happens to a run when something happens. Pure: no clock, no store, no network.

Every function takes a run's state and the time (seconds since the epoch) and returns a `Step`: the new state, and
the effects that led to it in order. Refused requests raise and change nothing.

    created -> running <-> paused        any of them -> stopped; running or paused -> finished
    a running run has exactly one open round; a round ends aggregated (version + 1) or failed (version stays)
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from server_api import errors
from server_api.summary import Report, Summary, summarise
from spafl.protocol import EventKind, RunSettings, RunState

MAX_FAILURES = 3
"""Rounds that may fail in a row; then the run pauses itself instead of wasting the devices' energy."""

Data = dict[str, int | float | str | bool | list[float] | None]


@dataclass(frozen=True, slots=True)
class Round:
    """An open round: its devices start from `version`.

    leases    device -> expiry, of devices that hold a slot and have not reported
    lapsed    devices whose lease ran out; they may check in again
    reports   device -> what it reported, of devices whose update is counted
    """

    number: int
    version: int
    opened: float
    deadline: float
    extended: bool = False
    leases: Mapping[str, float] = field(default_factory=dict)
    lapsed: frozenset[str] = frozenset()
    reports: Mapping[str, Report] = field(default_factory=dict)

    @property
    def taken(self) -> int:
        """Returns the slots in use: by devices that train, and by devices that reported."""
        return len(self.leases) + len(self.reports)


@dataclass(frozen=True, slots=True)
class Run:
    """A run between two events.

    version       of the global thresholds; 0 is the bundle's
    number        of the last round opened, 0 before the first
    failures      rounds failed in a row
    paused_since  when it was paused, None unless it is
    """

    settings: RunSettings
    state: RunState = "created"
    version: int = 0
    number: int = 0
    rounds_done: int = 0
    rounds_failed: int = 0
    failures: int = 0
    paused_since: float | None = None
    round: Round | None = None

    @property
    def over(self) -> bool:
        """Returns whether no event can change the run any more."""
        return self.state in ("finished", "stopped")

    @property
    def due(self) -> float:
        """Returns when time alone changes the run next; infinity if never."""
        if self.round is None:
            return math.inf
        deadline = self.round.deadline if self.state == "running" else math.inf
        return min(deadline, min(self.round.leases.values(), default=math.inf))


@dataclass(frozen=True, slots=True)
class Effect:
    """Something that happened: the protocol's `Event` before it has an id and a time."""

    kind: EventKind
    round: int | None = None
    device: str | None = None
    data: Data = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Step:
    """A run after an event, and the effects of the event in order."""

    run: Run
    effects: tuple[Effect, ...] = ()

    def then(self, run: Run, *effects: Effect) -> "Step":
        """Returns this step continued to `run` by `effects`."""
        return Step(run, self.effects + effects)


def slots(settings: RunSettings) -> int:
    """Returns how many devices may take part in a round: target times over-selection, rounded up."""
    # 1.1 * 10 is 11.000000000000002 in floats: eleven slots, not twelve
    return math.ceil(round(settings.over_selection * settings.target, 9))


def start(run: Run, now: float) -> Step:
    """Returns the run with its first round open; unchanged if it runs.

    Raises:
        WrongState: it is paused (resume it) or over.
    """
    if run.state == "running":
        return Step(run)
    if run.state != "created":
        raise errors.WrongState(f"run {run.settings.name} is {run.state}: only a created run can be started")
    return _open(Step(replace(run, state="running"), (Effect("run.started"),)), now)


def pause(run: Run, now: float) -> Step:
    """Returns the run granting no leases; devices at work may report, and the deadline waits. Unchanged if paused.

    Raises:
        WrongState: it was never started, or is over.
    """
    if run.state == "paused":
        return Step(run)
    if run.state != "running":
        raise errors.WrongState(f"run {run.settings.name} is {run.state}: only a running run can be paused")
    step = settle(run, now)
    return _pause(step, now, "paused by the operator") if step.run.state == "running" else step


def resume(run: Run, now: float) -> Step:
    """Returns the run going on: the open round gets the time back it was paused for. Unchanged if it runs.

    Raises:
        WrongState: it was never started, or is over.
    """
    if run.state == "running":
        return Step(run)
    if run.state != "paused" or run.paused_since is None:
        raise errors.WrongState(f"run {run.settings.name} is {run.state}: only a paused run can be resumed")
    paused = now - run.paused_since
    running = replace(run, state="running", paused_since=None, failures=0)
    resumed = Effect("run.resumed", run.number if run.round else None)
    if run.round is None:
        return _open(Step(running, (resumed,)), now)
    round = replace(run.round, deadline=run.round.deadline + paused)
    return Step(replace(running, round=round), (resumed,))


def stop(run: Run, now: float) -> Step:
    """Returns the run ended for good; its open round fails. Unchanged if it is stopped.

    Raises:
        WrongState: it is finished.
    """
    if run.state == "stopped":
        return Step(run)
    if run.state == "finished":
        raise errors.WrongState(f"run {run.settings.name} is finished: nothing to stop")
    stopped = replace(run, state="stopped", paused_since=None)
    step = Step(stopped)
    if run.round is not None:
        step = _fail(step, now, "the run was stopped")
    return step.then(step.run, Effect("run.stopped"))


def check_in(run: Run, device: str, now: float) -> Step:
    """Returns the run with a lease for `device` in its open round; the lease it holds, if it holds one.

    Raises:
        RunOver, RunNotStarted, RunPaused: no round is open for it.
        AlreadyReported: this round counted its update.
        RoundFull: every slot is taken.
    """
    step = settle(run, now)
    run, round = step.run, step.run.round
    name = run.settings.name
    if run.over:
        raise errors.RunOver(f"run {name} is {run.state}: ask for another run")
    if run.state == "created":
        raise errors.RunNotStarted(f"run {name} is not started yet")
    if round is not None and device in round.leases:
        return step
    if run.state == "paused" or round is None:
        raise errors.RunPaused(f"run {name} is paused")
    if device in round.reports:
        raise errors.AlreadyReported(f"round {round.number} of run {name} counted this device's update")
    if round.taken >= slots(run.settings):
        raise errors.RoundFull(f"all {slots(run.settings)} slots of round {round.number} are taken")
    expires = now + run.settings.lease
    granted = replace(round, leases={**round.leases, device: expires}, lapsed=round.lapsed - {device})
    return step.then(
        replace(run, round=granted), Effect("lease.granted", round.number, device, {"expires": expires})
    )


def report(run: Run, number: int, device: str, version: int, update: Report, now: float) -> Step:
    """Returns the run with `update`, trained from `version`, counted in round `number`; the last one closes it.

    The same update again changes nothing.

    Raises:
        NotFound: the run has had no such round.
        RoundClosed: the round is not open any more.
        UpdateDiffers: another update of this device is counted.
        LeaseExpired, NotLeased: the device has no slot.
        BadThresholds: the update was trained from another version than the round's.
    """
    step = settle(run, now)
    run, round = step.run, _named(step.run, number)
    if round is None:
        raise errors.RoundClosed(f"round {number} of run {run.settings.name} is closed: check in for another")
    if device in round.reports:
        if round.reports[device].digest != update.digest:
            raise errors.UpdateDiffers(f"another update of this device is counted in round {number}")
        return step
    if device in round.lapsed:
        raise errors.LeaseExpired(
            f"the lease in round {number} ran out before the update came: check in again"
        )
    if device not in round.leases:
        raise errors.NotLeased(f"this device has no lease in round {number}: check in first")
    if version != round.version:
        raise errors.BadThresholds(f"thresholds trained from version {version}, expected {round.version}")
    leases = dict(round.leases)
    del leases[device]
    counted = replace(round, leases=leases, reports={**round.reports, device: update})
    examples: Data = {"examples": update.metrics.examples}
    step = step.then(replace(run, round=counted), Effect("update.accepted", number, device, examples))
    return _aggregate(step, now) if len(counted.reports) >= run.settings.target else step


def close(run: Run, number: int, now: float) -> Step:
    """Returns the run with round `number` closed now: aggregated if any device reported, else failed.

    A closed round stays as it is.

    Raises:
        NotFound: the run has had no such round.
    """
    step = settle(run, now)
    round = _named(step.run, number)
    if round is None:
        return step
    return _aggregate(step, now) if round.reports else _fail(step, now, "closed without any update")


def settle(run: Run, now: float) -> Step:
    """Returns the run after everything that time alone did by `now`: leases ran out, the deadline came."""
    if run.due > now or run.round is None:
        return Step(run)
    gone = [device for device, expires in run.round.leases.items() if expires <= now]
    leases = {device: expires for device, expires in run.round.leases.items() if expires > now}
    round = replace(run.round, leases=leases, lapsed=run.round.lapsed | set(gone))
    lapses = (Effect("lease.expired", round.number, device) for device in sorted(gone))
    step = Step(replace(run, round=round), tuple(lapses))
    if run.state != "running" or round.deadline > now:
        return step
    if len(round.reports) >= run.settings.least:
        return _aggregate(step, now)
    if round.extended:
        reason = f"{len(round.reports)} updates by the deadline, needed {run.settings.least}"
        return _fail(step, now, reason)
    # from now, not from the old deadline: after an outage devices get the whole extension
    later = replace(round, deadline=now + run.settings.deadline, extended=True)
    extended = Effect("round.extended", round.number, data={"deadline": later.deadline})
    return step.then(replace(run, round=later), extended)


def _named(run: Run, number: int) -> Round | None:
    """Returns the round `number` if it is open, None if it is closed."""
    if not 1 <= number <= run.number:
        raise errors.NotFound(f"run {run.settings.name} has had {run.number} rounds, none numbered {number}")
    return run.round if run.round is not None and run.round.number == number else None


def _open(step: Step, now: float) -> Step:
    run = step.run
    round = Round(run.number + 1, run.version, now, now + run.settings.deadline)
    opened = Effect("round.opened", round.number, data={"version": round.version, "deadline": round.deadline})
    return step.then(replace(run, number=round.number, round=round), opened)


def _pause(step: Step, now: float, reason: str) -> Step:
    paused = replace(step.run, state="paused", paused_since=now)
    return step.then(paused, Effect("run.paused", data={"reason": reason}))


def _aggregate(step: Step, now: float) -> Step:
    run, round = step.run, step.run.round
    assert round is not None, "callers hold an open round"
    closed = replace(run, version=run.version + 1, rounds_done=run.rounds_done + 1, failures=0, round=None)
    data: Data = {"version": closed.version, **_figures(round)}
    step = step.then(closed, Effect("round.aggregated", round.number, data=data))
    if closed.rounds_done >= run.settings.rounds:
        finished = replace(closed, state="finished", paused_since=None)
        return step.then(finished, Effect("run.finished", data={"version": closed.version}))
    return _open(step, now) if closed.state == "running" else step


def _fail(step: Step, now: float, reason: str) -> Step:
    run, round = step.run, step.run.round
    assert round is not None, "callers hold an open round"
    failures = run.failures + 1
    closed = replace(run, rounds_failed=run.rounds_failed + 1, failures=failures, round=None)
    data: Data = {"reason": reason, **_figures(round)}
    step = step.then(closed, Effect("round.failed", round.number, data=data))
    if closed.state != "running":
        return step
    if failures >= MAX_FAILURES:
        return _pause(step, now, f"{failures} rounds failed in a row, the last because: {reason}")
    return _open(step, now)


def _figures(round: Round) -> Data:
    summary: Summary = summarise(round.reports)
    return {
        "leased": round.taken,
        "reported": len(round.reports),
        "loss": summary.loss,
        "accuracy": summary.accuracy,
        "density": list(summary.density),
    }
