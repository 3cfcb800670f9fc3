"""A run's events add up to what an operator sees."""

import io
from dataclasses import replace
from typing import Any

import pytest

from server_api.operator import terminal
from server_api.operator.progress import SHOWN_ROUNDS, Progress
from spafl.protocol import Event, RoundView, RunSettings, RunView

START = Progress(run="demo", rounds=3, target=2)
FIGURES = {"leased": 2, "reported": 2, "loss": 0.5, "accuracy": 0.75, "density": [1.0, 0.5]}


def events(*rows: tuple[Any, ...]) -> list[Event]:
    """Events of (kind, round, device, data), the rest left out."""
    keys = ("kind", "round", "device", "data")
    made = []
    for id, row in enumerate(rows, 1):
        fields = {key: value for key, value in zip(keys, row, strict=False) if value is not None}
        made.append(Event(id=id, time=float(id), run="demo", **fields))
    return made


def after(*rows: tuple[Any, ...]) -> Progress:
    progress = START
    for event in events(*rows):
        progress = progress.after(event)
    return progress


def test_a_round_fills_up() -> None:
    opened = (("run.created",), ("run.started",), ("round.opened", 1))
    assert (after(*opened).state, after(*opened).round) == ("running", 1)
    leased = (*opened, ("lease.granted", 1, "a"), ("lease.granted", 1, "b"))
    assert after(*leased).training == {"a", "b"}
    half = after(*leased, ("update.accepted", 1, "a"), ("lease.expired", 1, "b"))
    assert (half.training, half.reported) == (frozenset(), {"a"})


def test_an_aggregated_round_counts_and_shows_its_figures() -> None:
    progress = after(("run.started",), ("round.opened", 1), ("round.aggregated", 1, None, FIGURES))
    (outcome,) = progress.outcomes
    assert (progress.done, progress.failed, progress.round) == (1, 0, None)
    assert (outcome.loss, outcome.accuracy, outcome.density, outcome.reported) == (0.5, 0.75, 0.75, 2)


def test_a_failed_round_is_not_a_done_one() -> None:
    progress = after(
        ("round.opened", 1), ("round.failed", 1, None, {"reason": "nobody came"}), ("round.opened", 2)
    )
    assert (progress.done, progress.failed, progress.round) == (0, 1, 2)
    assert progress.outcomes[0].reason == "nobody came"
    assert progress.outcomes[0].loss is None


def test_pause_says_why_until_it_is_over() -> None:
    paused = after(("run.started",), ("run.paused", None, None, {"reason": "3 rounds failed"}))
    assert (paused.state, paused.note) == ("paused", "3 rounds failed")
    assert after(("run.paused", None, None, {"reason": "x"}), ("run.resumed",)).note == ""


@pytest.mark.parametrize("end", ["finished", "stopped"])
def test_a_run_ends(end: str) -> None:
    progress = after(("run.started",), ("round.opened", 1), (f"run.{end}",))
    assert (progress.state, progress.round) == (end, None)


def test_only_the_last_rounds_are_kept() -> None:
    progress = after(*(("round.aggregated", number, None, FIGURES) for number in range(1, 101)))
    assert progress.done == 100
    assert [outcome.round for outcome in progress.outcomes] == list(range(101 - SHOWN_ROUNDS, 101))


def drawn(thing: Any, width: int = 80) -> str:
    console = terminal.console(file=io.StringIO(), width=width, force_terminal=False)
    console.print(thing)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_screen_shows_bars_counts_and_figures() -> None:
    rows = (
        ("run.started",),
        ("round.opened", 1),
        ("round.aggregated", 1, None, FIGURES),
        ("round.opened", 2),
        ("lease.granted", 2, "a"),
        ("update.accepted", 2, "a"),
    )
    text = drawn(terminal.screen(after(*rows)))
    assert "1/3 rounds" in text
    assert "1/2 reported, 0 training" in text
    assert "0.750" in text


def test_the_screen_follows_the_events() -> None:
    console = terminal.console(file=io.StringIO(), force_terminal=True, width=100)
    last = terminal.show(console, START, events(("run.started",), ("round.opened", 1), ("run.finished",)))
    assert last.state == "finished"
    assert isinstance(console.file, io.StringIO)
    assert "finished" in console.file.getvalue()


def test_markup_in_what_devices_say_is_text() -> None:
    """Names and reasons come from outside: a bracket must neither style nor break the screen."""
    hostile = "[red]x[/nope]"
    text = drawn(terminal.screen(after(("run.paused", None, None, {"reason": hostile}))))
    assert hostile in text
    failed = after(("round.failed", 1, None, {"reason": hostile}))
    assert hostile in drawn(terminal.screen(failed), width=120)


VIEW = RunView(
    run="demo",
    settings=RunSettings(name="demo", bundle="0" * 64),
    state="running",
    layout="0" * 16,
    round=1,
    version=4,
    created=0.0,
    rounds_done=4,
    rounds_failed=1,
)
ROUND = RoundView(
    run="demo",
    round=5,
    state="open",
    version=4,
    opened=0.0,
    deadline=600.0,
    leased=3,
    reported=2,
    target=5,
    minimum=3,
    loss=0.25,
)


def test_tables_and_cards() -> None:
    assert "4/15" in drawn(terminal.run_table([VIEW]))
    table = drawn(terminal.round_table([ROUND]))
    assert "2/5" in table
    assert "0.250" in table
    card = drawn(terminal.run_card(VIEW, ROUND), width=120)
    assert "2 of 5 reported, 3 slots taken" in card
    assert "0" * 64 in card


def test_a_long_name_is_folded_not_cut() -> None:
    name = "n" * 64
    text = drawn(terminal.run_table([replace(VIEW, run=name)]))
    assert text.count("n") >= 64
