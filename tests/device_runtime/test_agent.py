import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest

from device_runtime import agent as agent_module
from device_runtime.agent import Agent
from device_runtime.engines import StepResult
from device_runtime.errors import DataError, StateError, Stopped, Unauthorised
from device_runtime.examples import LocalData
from device_runtime.retry import Backoff
from device_runtime.state import DeviceState
from device_runtime.watch import Watch
from spafl import algorithm
from spafl.bundle import Bundle
from spafl.protocol import Policy
from tests.device_runtime.conftest import Events
from tests.device_runtime.tiny import LAYOUT, FileServer, NumpyEngine, json_answer, make_lease, problem

Make = Callable[..., Agent]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch, watch: Watch) -> None:
    sleep = watch.sleep
    monkeypatch.setattr(watch, "sleep", lambda seconds: sleep(min(seconds, 0.001)))


def rest(state: DeviceState, bundle: Bundle) -> dict[str, np.ndarray]:
    return state.rest(bundle)[0]


def test_a_run_from_the_first_check_in_to_its_end(
    agent: Make, server: FileServer, state: DeviceState, events: Events
) -> None:
    assert agent().work() == 3
    journal = state.journal
    assert (journal.phase, journal.trained, journal.updates, journal.late) == ("idle", 3, 3, 0)
    assert journal.version == 2  # the thresholds the last round began from
    assert len(server.load()["updates"]) == 3
    assert events.names().count("epoch") == 6
    assert events.names()[-1] == "finished"


def test_metrics_tell_what_was_trained(agent: Make, server: FileServer, bundle: Bundle) -> None:
    agent(rounds=1).work()
    put = next(request for request in server.requests if request.method == "PUT")
    metrics = json.loads(put.headers["Spafl-Metrics"])
    assert metrics["examples"] == 9
    # 2 epochs of 4 + 4 + 1 examples: the last one alone is dropped, there is a norm statistic
    assert metrics["steps"] == 4
    assert 0 < metrics["loss"] < 10
    assert 0 <= metrics["accuracy"] <= 1
    assert len(metrics["density"]) == 1


def test_one_example_left_over_is_dropped_and_counted(agent: Make, events: Events) -> None:
    agent(rounds=1).work()
    assert events.of("round.trained")[0]["dropped"] == 2
    assert [fields["examples"] for fields in events.of("epoch")] == [8, 8]


def test_rounds_limits_the_updates_of_one_call(agent: Make, state: DeviceState) -> None:
    assert agent(rounds=2).work() == 2
    assert agent(rounds=2).work() == 1  # the run is over
    assert state.journal.updates == 3


def test_catch_up_goes_from_the_thresholds_begun_from(
    agent: Make, server: FileServer, state: DeviceState, bundle: Bundle
) -> None:
    agent(rounds=1).work()
    before, base = state.rest(bundle)
    assert np.array_equal(base, bundle.initial_thresholds())
    data = server.load()
    data["versions"][1] = [0.5, 0.25, -0.5, 0.0]
    server.save(data)

    begun: list[dict[str, np.ndarray]] = []

    class Spy(NumpyEngine):
        def begin_round(self, tensors: Any, base: Any, target: Any) -> Any:
            start = super().begin_round(tensors, base, target)
            begun.append(dict(self.state))
            return start

    agent(Spy, rounds=1).work()
    expected = algorithm.apply_global(LAYOUT, before, base, np.array([0.5, 0.25, -0.5, 0.0], np.float32))
    assert np.array_equal(begun[0]["hidden.weight"], expected["hidden.weight"])
    assert np.array_equal(begun[0]["hidden.threshold"], [0.5, 0.25, -0.5, 0.0])
    after, base = state.rest(bundle)
    assert np.array_equal(base, [0.5, 0.25, -0.5, 0.0])
    assert not np.array_equal(after["hidden.threshold"], base)
    assert state.journal.version == 1


def test_nothing_is_leased_before_the_device_can_train(agent: Make, server: FileServer) -> None:
    worker = agent()

    def no_data(manifest: object) -> LocalData:
        raise DataError("no examples on this device")

    worker._load = no_data
    with pytest.raises(DataError):
        worker.work()
    assert not [request for request in server.requests if request.url.path.endswith("/leases")]


def test_a_state_of_another_run_leases_nothing(
    agent: Make, server: FileServer, state: DeviceState, bundle: Bundle
) -> None:
    state.leased(replace(make_lease(bundle), run="other"))
    with pytest.raises(StateError, match="holds the model of run 'other'"):
        agent().work()
    assert not [request for request in server.requests if request.url.path.endswith("/leases")]


def test_a_late_update_keeps_its_training(
    agent: Make, server: FileServer, state: DeviceState, bundle: Bundle, events: Events
) -> None:
    initial = bundle.initial_state()
    server.before = lambda request: problem(410, "round-closed") if request.method == "PUT" else None
    worker = agent(rounds=1)

    def stop_after_late(name: str, **fields: object) -> None:
        Events.event(events, name, **fields)
        if name == "update.late":
            worker._watch.stop()

    events.event = stop_after_late  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        worker.work()
    journal = state.journal
    assert (journal.phase, journal.trained, journal.updates, journal.late) == ("idle", 1, 0, 1)
    assert not np.array_equal(rest(state, bundle)["hidden.weight"], initial["hidden.weight"])


@pytest.mark.parametrize(
    ("status", "word"),
    [
        (410, "lease-expired"),
        (403, "not-leased"),
        (409, "update-differs"),
        (422, "bad-thresholds"),
        (410, "run-over"),
    ],
)
def test_an_update_the_server_never_takes_is_let_go(
    agent: Make, server: FileServer, state: DeviceState, status: int, word: str
) -> None:
    refusals = iter([problem(status, word)])
    server.before = lambda request: next(refusals, None) if request.method == "PUT" else None
    assert agent().work() == 3
    assert (state.journal.late, state.journal.updates, state.journal.trained) == (1, 3, 4)


def test_an_update_whose_answer_was_lost_is_sent_again_with_the_same_bytes(
    agent: Make, server: FileServer, state: DeviceState
) -> None:
    lost = iter([True])

    def lose_first(request: httpx2.Request) -> httpx2.Response | None:
        if request.method == "PUT" and next(lost, False):
            server.update(request, request.url.path.split("/")[5:])  # counted, and then the line breaks
            raise httpx2.ReadTimeout("gone")
        return None

    server.before = lose_first
    assert agent(rounds=1).work() == 1
    puts = [request for request in server.requests if request.method == "PUT"]
    assert len(puts) == 2
    assert puts[0].content == puts[1].content
    assert puts[0].headers["Spafl-Metrics"] == puts[1].headers["Spafl-Metrics"]
    assert state.journal.updates == 1


def test_offline_keeps_everything_and_goes_on(
    agent: Make, server: FileServer, monkeypatch: pytest.MonkeyPatch, events: Events
) -> None:
    monkeypatch.setattr(agent_module, "OFFLINE", Backoff(first=0.001, cap=0.001))
    outages = iter([True] * 12)

    def outage(request: httpx2.Request) -> httpx2.Response | None:
        if next(outages, False):
            raise httpx2.ConnectError("no route to host")
        return None

    server.before = outage
    assert agent().work() == 3
    assert len(events.of("waiting")) == 2  # twelve failures are two windows of five attempts, and two more


@pytest.mark.parametrize(
    ("status", "word"), [(409, "already-reported"), (503, "round-full"), (503, "run-paused")]
)
def test_a_busy_server_is_asked_again_after_its_time(
    agent: Make, server: FileServer, events: Events, status: int, word: str
) -> None:
    busy = iter([problem(status, word, {"Retry-After": "7"})])
    server.before = lambda request: next(busy, None) if request.url.path.endswith("/leases") else None
    assert agent(rounds=1).work() == 1
    waiting = events.of("waiting")[0]
    assert waiting["seconds"] == 7
    assert word in str(waiting["reason"])


def test_a_stop_saves_the_step_and_the_next_call_goes_on_from_it(
    agent: Make, state: DeviceState, watch: Watch, bundle: Bundle, server: FileServer, tmp_path: Any
) -> None:
    class StopsAtThree(NumpyEngine):
        def step(self, *args: Any) -> StepResult:
            if self.steps == 2:
                watch.stop()
            return super().step(*args)

    with pytest.raises(Stopped):
        agent(StopsAtThree).work()
    progress = state.journal.progress
    assert progress is not None
    assert (state.journal.phase, progress.steps, progress.epoch, progress.batch) == ("training", 3, 1, 1)

    resumed: list[NumpyEngine] = []

    class Remembered(NumpyEngine):
        def __init__(self, bundle: Bundle) -> None:
            super().__init__(bundle)
            resumed.append(self)

    with Watch(Events()) as fresh:
        worker = agent(Remembered, rounds=1)
        worker._watch = fresh
        worker._client.wait = fresh.sleep
        assert worker.work() == 1
    assert resumed[0].steps == 1  # three before the stop, one after: none twice
    stopped = rest(state, bundle)

    other = FileServer(tmp_path / "other.json", bundle, rounds=1)
    straight = trained_without_stop(bundle, other, tmp_path)
    assert all(np.array_equal(stopped[name], straight[name]) for name in straight)


def trained_without_stop(bundle: Bundle, server: FileServer, tmp_path: Any) -> dict[str, np.ndarray]:
    from device_runtime.agent import Work
    from device_runtime.client import Client
    from device_runtime.journal import Identity
    from spafl.secret import Secret
    from tests.device_runtime.tiny import TOKEN, tiny_data

    report = Events()
    with DeviceState(tmp_path / "other") as state, Watch(report) as watch:
        state.enrolled(Identity(server="http://server", device="d1", token=Secret(TOKEN)))
        client = Client("http://server", Secret(TOKEN), transport=server.transport)
        Agent(
            client,
            state,
            Work("r"),
            load=lambda _: tiny_data(),
            open_engine=NumpyEngine,
            watch=watch,
            report=report,
        ).work()
        return state.rest(bundle)[0]


def test_conditions_are_checked_before_a_lease_is_asked_for(
    agent: Make, server: FileServer, reading: dict[str, object], events: Events
) -> None:
    server.policy = Policy(require_charging=True)
    reading["charging"] = False
    asked_while_unmet = []

    def event(name: str, **fields: object) -> None:
        Events.event(events, name, **fields)
        if name == "held":
            asked_while_unmet.extend(r.url.path for r in server.requests if r.url.path.endswith("/leases"))
            reading["charging"] = True

    events.event = event  # type: ignore[method-assign]
    assert agent(rounds=1).work() == 1
    assert events.of("held") == [{"reasons": ["not charging"]}]
    assert asked_while_unmet == []


def test_conditions_are_checked_while_training_and_the_round_is_saved_first(
    agent: Make, server: FileServer, reading: dict[str, object], events: Events
) -> None:
    server.policy = Policy(require_charging=True)
    reading["charging"] = True

    class Unplugs(NumpyEngine):
        def step(self, *args: Any) -> StepResult:
            if self.steps == 1:
                reading["charging"] = False
            return super().step(*args)

    def event(name: str, **fields: object) -> None:
        Events.event(events, name, **fields)
        if name == "held":
            reading["charging"] = True

    events.event = event  # type: ignore[method-assign]
    assert agent(Unplugs, rounds=1).work() == 1
    at = events.names().index("held")
    assert events[at - 1] == ("checkpoint", {"round": 1, "steps": 2})


def test_diverged_training_is_undone_and_the_round_left_out(
    agent: Make, server: FileServer, state: DeviceState, bundle: Bundle, events: Events, watch: Watch
) -> None:
    class Diverges(NumpyEngine):
        def step(self, *args: Any) -> StepResult:
            result = super().step(*args)
            return replace(result, loss=float("nan")) if self.steps == 2 else result

    def event(name: str, **fields: object) -> None:
        Events.event(events, name, **fields)
        if name == "waiting":
            watch.stop()

    events.event = event  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        agent(Diverges, steps=1).work()
    journal = state.journal
    assert (journal.phase, journal.diverged, journal.trained, journal.skip) == ("idle", 1, 0, 1)
    assert journal.checkpoint is None
    initial = bundle.initial_state()
    assert all(np.array_equal(tensor, initial[name]) for name, tensor in rest(state, bundle).items())
    assert not server.load()["updates"]
    assert "lower the run's lr" in str(events.of("round.diverged")[0]["reason"])


def test_weights_that_are_not_finite_are_never_reported(
    agent: Make, server: FileServer, watch: Watch
) -> None:
    class EndsInNan(NumpyEngine):
        def end_round(self) -> dict[str, np.ndarray]:
            watch.stop()
            return {**super().end_round(), "head.weight": np.full((2, 4), np.nan, np.float32)}

    with pytest.raises(Stopped):
        agent(EndsInNan).work()
    assert not [request for request in server.requests if request.method == "PUT"]


def test_a_leased_round_is_asked_for_again(agent: Make, state: DeviceState, bundle: Bundle) -> None:
    state.leased(make_lease(bundle))  # and killed before training
    assert agent(rounds=1).work() == 1
    assert state.journal.trained == 1


def test_batches_of_one_cannot_train_a_norm(agent: Make, server: FileServer, bundle: Bundle) -> None:
    lease = make_lease(bundle)
    single = replace(lease, hyperparameters=replace(lease.hyperparameters, batch_size=1))
    server.before = lambda request: json_answer(201, single) if request.url.path.endswith("/leases") else None
    with pytest.raises(DataError, match="at least 2"):
        agent().work()


def test_a_revoked_token_ends_the_work_with_words(agent: Make, server: FileServer) -> None:
    server.before = lambda request: problem(401, "unauthorised")
    with pytest.raises(Unauthorised, match="unauthorised"):
        agent().work()


def test_global_thresholds_it_has_are_not_fetched_again(agent: Make, server: FileServer) -> None:
    agent(rounds=1).work()
    assert not [request for request in server.requests if "/thresholds/" in request.url.path]
