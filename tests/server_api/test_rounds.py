"""The round machine, one story per test. Any sequence at all: tests/property/test_round_machine.py."""

import pytest

from server_api import errors, rounds
from server_api.rounds import Run, Step
from server_api.summary import Report
from spafl.protocol import Metrics, RunSettings


def run_of(**settings: object) -> Run:
    return Run(RunSettings.from_json({"name": "run", "bundle": "0" * 64, **settings}))


def update(digest: str = "one", **metrics: object) -> Report:
    return Report(digest, Metrics.from_json({"examples": 5, **metrics}))


def kinds(step: Step) -> list[str]:
    return [effect.kind for effect in step.effects]


def started(**settings: object) -> Run:
    return rounds.start(run_of(**{"deadline": 100, "lease": 30, **settings}), 0.0).run


def joined(run: Run, *devices: str, now: float = 1.0) -> Run:
    for device in devices:
        run = rounds.check_in(run, device, now).run
    return run


def reported(run: Run, *devices: str, now: float = 2.0) -> Step:
    step = Step(run)
    for device in devices:
        step = rounds.report(step.run, run.number, device, run.version, update(), now)
    return step


def test_the_last_report_aggregates_and_the_next_round_opens_at_once():
    run = joined(started(target=2, rounds=2), "a", "b")
    step = reported(run, "a", "b")
    assert kinds(step) == ["update.accepted", "round.aggregated", "round.opened"]
    assert (step.run.version, step.run.rounds_done) == (1, 1)
    assert step.run.round is not None
    assert (step.run.round.number, step.run.round.version) == (2, 1)


def test_the_last_round_finishes_the_run():
    step = reported(joined(started(target=1, rounds=1), "a"), "a")
    assert kinds(step) == ["update.accepted", "round.aggregated", "run.finished"]
    assert step.run.over
    assert step.run.round is None


def test_a_device_asking_again_gets_the_lease_it_has():
    run = joined(started(), "a")
    step = rounds.check_in(run, "a", 20.0)
    assert step == Step(run)


def test_over_selection_rounds_up_but_not_by_a_float_error():
    assert rounds.slots(run_of(target=10, over_selection=1.1).settings) == 11
    assert rounds.slots(run_of(target=3, over_selection=1.1).settings) == 4


def test_a_full_round_takes_nobody_until_a_lease_runs_out():
    run = joined(started(target=2, minimum=1), "a", "b")
    with pytest.raises(errors.RoundFull, match="all 2 slots"):
        rounds.check_in(run, "c", 30.9)
    step = rounds.check_in(run, "c", 31.0)
    assert kinds(step) == ["lease.expired", "lease.expired", "lease.granted"]
    assert step.run.round is not None
    assert step.run.round.lapsed == {"a", "b"}


def test_a_report_keeps_its_slot():
    run = joined(started(target=2), "a", "b")
    run = reported(run, "a").run
    with pytest.raises(errors.RoundFull):
        rounds.check_in(run, "c", 3.0)
    with pytest.raises(errors.AlreadyReported):
        rounds.check_in(run, "a", 3.0)


def test_a_report_after_the_lease_is_refused_until_the_device_checks_in_again():
    run = joined(started(target=2), "a")
    with pytest.raises(errors.LeaseExpired):
        reported(run, "a", now=31.0)
    run = rounds.check_in(run, "a", 31.0).run
    assert kinds(reported(run, "a", now=32.0)) == ["update.accepted"]


def test_the_same_report_again_changes_nothing_and_another_is_refused():
    run = reported(joined(started(target=2), "a"), "a").run
    assert rounds.report(run, 1, "a", 0, update(), 3.0) == Step(run)
    with pytest.raises(errors.UpdateDiffers):
        rounds.report(run, 1, "a", 0, update("two"), 3.0)


def test_a_report_needs_a_lease_the_right_round_and_the_right_version():
    run = joined(started(target=2), "a")
    with pytest.raises(errors.NotLeased):
        rounds.report(run, 1, "b", 0, update(), 2.0)
    with pytest.raises(errors.BadThresholds, match="version 1, expected 0"):
        rounds.report(run, 1, "a", 1, update(), 2.0)
    for unknown in (0, 2):
        with pytest.raises(errors.NotFound, match="has had 1 rounds"):
            rounds.report(run, unknown, "a", 0, update(), 2.0)


def test_late_devices_are_told_so():
    run = joined(started(target=1, over_selection=2), "a", "b")
    run = reported(run, "a").run
    with pytest.raises(errors.RoundClosed):
        rounds.report(run, 1, "b", 0, update(), 3.0)


def test_the_deadline_closes_with_the_minimum():
    run = reported(joined(started(target=4, minimum=2), "a", "b", "c"), "a", "b").run
    assert rounds.settle(run, 30.9) == Step(run)
    step = rounds.settle(run, 100.0)
    assert kinds(step) == ["lease.expired", "round.aggregated", "round.opened"]
    assert step.effects[1].data["reported"] == 2


def test_too_few_get_one_extension_then_the_round_fails():
    run = reported(joined(started(target=4, minimum=2), "a"), "a").run
    extended = rounds.settle(run, 150.0)
    assert kinds(extended) == ["round.extended"]
    assert extended.effects[0].data == {"deadline": 250.0}
    failed = rounds.settle(extended.run, 250.0)
    assert kinds(failed) == ["round.failed", "round.opened"]
    assert failed.effects[0].data["reason"] == "1 updates by the deadline, needed 2"
    assert (failed.run.version, failed.run.rounds_failed, failed.run.number) == (0, 1, 2)


def fail_once(run: Run, now: float) -> Step:
    return rounds.close(run, run.number, now)


def test_three_failures_in_a_row_pause_the_run():
    run = started(target=1)
    for now in (1.0, 2.0):
        run = fail_once(run, now).run
    step = fail_once(run, 3.0)
    assert kinds(step) == ["round.failed", "run.paused"]
    assert step.run.state == "paused"
    assert "closed without any update" in str(step.effects[1].data["reason"])
    resumed = rounds.resume(step.run, 4.0)
    assert kinds(resumed) == ["run.resumed", "round.opened"]
    assert resumed.run.failures == 0


def test_a_success_forgets_the_failures_before_it():
    run = started(target=1, rounds=9)
    for now in (1.0, 2.0):
        run = fail_once(run, now).run
    run = reported(joined(run, "a"), "a").run
    for now in (3.0, 4.0):
        run = fail_once(run, now).run
    assert run.state == "running"


def test_close_now_aggregates_what_there_is():
    run = reported(joined(started(target=4, minimum=3), "a", "b"), "a").run
    step = rounds.close(run, 1, 3.0)
    assert kinds(step) == ["round.aggregated", "round.opened"]
    assert rounds.close(step.run, 1, 4.0) == Step(step.run)
    with pytest.raises(errors.NotFound):
        rounds.close(step.run, 3, 4.0)


def test_a_pause_stops_the_clock_but_not_the_devices_at_work():
    run = joined(started(target=2, minimum=1), "a", now=1.0)
    paused = rounds.pause(run, 10.0)
    assert kinds(paused) == ["run.paused"]
    with pytest.raises(errors.RunPaused):
        rounds.check_in(paused.run, "b", 11.0)
    assert rounds.check_in(paused.run, "a", 11.0).run == paused.run
    run = reported(paused.run, "a", now=20.0).run
    assert rounds.settle(run, 500.0) == Step(run)
    run = rounds.resume(run, 510.0).run
    assert run.round is not None
    assert run.round.deadline == 600.0


def test_a_round_completed_in_a_pause_opens_no_other():
    run = rounds.pause(joined(started(target=1, rounds=2), "a"), 2.0).run
    step = reported(run, "a")
    assert kinds(step) == ["update.accepted", "round.aggregated"]
    assert (step.run.state, step.run.round) == ("paused", None)
    assert kinds(rounds.resume(step.run, 9.0)) == ["run.resumed", "round.opened"]


def test_the_last_round_completed_in_a_pause_finishes_the_run():
    run = rounds.pause(joined(started(target=1, rounds=1), "a"), 2.0).run
    assert reported(run, "a").run.state == "finished"


def test_stop_is_for_good():
    step = rounds.stop(joined(started(), "a"), 2.0)
    assert kinds(step) == ["round.failed", "run.stopped"]
    assert step.effects[0].data["reason"] == "the run was stopped"
    with pytest.raises(errors.RunOver, match="stopped"):
        rounds.check_in(step.run, "a", 3.0)
    with pytest.raises(errors.RoundClosed):
        rounds.report(step.run, 1, "a", 0, update(), 3.0)


def test_steering_twice_is_steering_once():
    run = started()
    assert rounds.start(run, 1.0) == Step(run)
    assert rounds.resume(run, 1.0) == Step(run)
    paused = rounds.pause(run, 1.0).run
    assert rounds.pause(paused, 2.0) == Step(paused)
    stopped = rounds.stop(run, 1.0).run
    assert rounds.stop(stopped, 2.0) == Step(stopped)


@pytest.mark.parametrize(
    ("action", "run"),
    [
        (rounds.pause, run_of()),
        (rounds.resume, run_of()),
        (rounds.start, Run(run_of().settings, state="paused", paused_since=0.0)),
        (rounds.start, Run(run_of().settings, state="finished")),
        (rounds.pause, Run(run_of().settings, state="stopped")),
        (rounds.resume, Run(run_of().settings, state="stopped")),
        (rounds.stop, Run(run_of().settings, state="finished")),
    ],
)
def test_what_a_state_makes_impossible(action, run):
    with pytest.raises(errors.WrongState, match=f"run run is {run.state}"):
        action(run, 1.0)


def test_a_created_run_has_no_slots_yet():
    with pytest.raises(errors.RunNotStarted):
        rounds.check_in(run_of(), "a", 1.0)


def test_a_rounds_figures_are_weighted_by_examples():
    run = joined(started(target=2), "a", "b")
    step = rounds.report(run, 1, "a", 0, update(examples=1, loss=4.0, density=(1.0, 0.5)), 2.0)
    step = rounds.report(step.run, 1, "b", 0, update(examples=3, loss=0.0, density=(0.2, 0.1)), 2.0)
    data = step.effects[1].data
    assert (data["leased"], data["reported"], data["loss"], data["accuracy"]) == (2, 2, 1.0, None)
    assert data["density"] == pytest.approx([0.4, 0.2])
