"""The round machine under any sequence of events."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server_api import errors, rounds
from server_api.rounds import MAX_FAILURES, Effect, Run, Step
from server_api.summary import Report
from spafl.protocol import Metrics, RunSettings

DEVICES = [f"d{number}" for number in range(6)]
BUNDLE = "0" * 64


@dataclass
class Seen:
    """What the effects alone tell an observer of the run."""

    counted: set[tuple[int, str]] = field(default_factory=set)
    leased: dict[tuple[int, str], float] = field(default_factory=dict)
    versions: list[int] = field(default_factory=lambda: [0])
    closed: dict[int, str] = field(default_factory=dict)

    def add(self, effect: Effect) -> None:
        key = (effect.round or 0, effect.device or "")
        match effect.kind:
            case "update.accepted":
                assert key not in self.counted, "a device was counted twice in a round"
                assert key in self.leased, "an update was counted without a lease"
                del self.leased[key]
                self.counted.add(key)
            case "lease.granted":
                assert key not in self.counted, "a device that reported got another lease"
                self.leased[key] = effect.data["expires"]
            case "lease.expired":
                del self.leased[key]
            case "round.aggregated" | "round.failed":
                assert effect.round not in self.closed, "a round was closed twice"
                self.closed[effect.round] = effect.kind
                if effect.kind == "round.aggregated":
                    self.versions.append(effect.data["version"])


class RoundMachine(RuleBasedStateMachine):
    @initialize(
        rounds=st.integers(1, 4),
        goal=st.integers(1, 4),
        minimum=st.integers(1, 4),
        over_selection=st.sampled_from([1.0, 1.3, 2.0]),
    )
    def create(self, rounds: int, goal: int, minimum: int, over_selection: float) -> None:
        self.settings = RunSettings(
            name="run",
            bundle=BUNDLE,
            rounds=rounds,
            target=goal,
            minimum=min(minimum, goal),
            over_selection=over_selection,
            deadline=100,
            lease=40,
        )
        self.run, self.now, self.seen = Run(self.settings), 1000.0, Seen()

    def take(self, act: Callable[..., Step], *arguments: Any) -> Step | None:
        """Returns the step if `act` is granted; checks what every step must keep."""
        before = self.run
        try:
            step = act(self.run, *arguments, self.now)
        except errors.Refusal:
            return None
        assert step.effects or step.run == before, "the run changed and nobody was told"
        for effect in step.effects:
            self.seen.add(effect)
        self.run = step.run
        return step

    @rule(seconds=st.sampled_from([0.0, 1.0, 20.0, 39.0, 40.0, 100.0, 250.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def settle(self) -> None:
        self.take(rounds.settle)
        assert self.run.due > self.now, "something was due and is still due"
        again = rounds.settle(self.run, self.now)
        assert again == Step(self.run), "settling twice differs from settling once"

    @rule(device=st.sampled_from(DEVICES))
    def check_in(self, device: str) -> None:
        step = self.take(rounds.check_in, device)
        if step is not None:
            assert self.run.round is not None
            assert self.run.round.leases[device] > self.now

    @rule(device=st.sampled_from(DEVICES), digest=st.sampled_from("ab"), back=st.integers(0, 1))
    def report(self, device: str, digest: str, back: int) -> None:
        number, version = self.run.number - back, self.run.version
        held = self.seen.leased.get((number, device), -math.inf) > self.now
        step = self.take(rounds.report, number, device, version, Report(digest, Metrics(examples=3)))
        accepted = step is not None and any(effect.kind == "update.accepted" for effect in step.effects)
        assert not accepted or held, "an update was counted for a lease that had run out"

    @rule(act=st.sampled_from([rounds.start, rounds.start, rounds.pause, rounds.resume, rounds.resume]))
    def steer(self, act: Callable[[Run, float], Step]) -> None:
        self.take(act)

    @precondition(lambda self: self.run.number > 2)
    @rule()
    def stop(self) -> None:
        self.take(rounds.stop)

    @rule(back=st.integers(0, 1))
    def close(self, back: int) -> None:
        number = self.run.number - back
        if self.take(rounds.close, number) is not None:
            assert number in self.seen.closed

    @invariant()
    def versions_grow_by_one_with_each_aggregated_round(self) -> None:
        assert self.seen.versions == list(range(self.run.version + 1))
        assert self.run.rounds_done == list(self.seen.closed.values()).count("round.aggregated")
        assert self.run.rounds_failed == list(self.seen.closed.values()).count("round.failed")

    @invariant()
    def slots_are_never_exceeded(self) -> None:
        if self.run.round is not None:
            limit = math.ceil(round(self.settings.over_selection * self.settings.target, 6))
            assert len(self.run.round.leases) + len(self.run.round.reports) <= limit
            assert len(self.run.round.reports) < self.settings.target, "a full round is still open"
            assert not self.run.round.leases.keys() & self.run.round.reports.keys()

    @invariant()
    def a_running_run_has_one_open_round(self) -> None:
        assert (self.run.round is not None) or self.run.state != "running"
        assert (self.run.round is None) or self.run.state in ("running", "paused")
        assert (self.run.paused_since is not None) == (self.run.state == "paused")
        assert (self.run.state == "finished") == (self.run.rounds_done == self.settings.rounds)
        assert set(self.seen.closed) == set(range(1, self.run.number + (self.run.round is None)))

    @invariant()
    def failures_in_a_row_pause_the_run(self) -> None:
        assert self.run.failures < MAX_FAILURES or self.run.state != "running"


RoundMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRoundMachine = RoundMachine.TestCase
