"""Runs, rounds and progress as a person reads them in a terminal."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from server_api.operator.progress import Progress
from spafl.protocol import Event, RoundView, RunView

_COLOURS = {
    "running": "green",
    "open": "green",
    "finished": "bold green",
    "aggregated": "green",
    "paused": "yellow",
    "failed": "red",
    "stopped": "red",
}

_UNFOLDED = 1000


def console(**options: Any) -> Console:
    """Returns a console that prints names and reasons as they are: they come from outside and may hold markup.

    Into a pipe or a file lines are as long as they are, for `grep` and `awk`.
    """
    console = Console(markup=False, emoji=False, highlight=False, **options)
    if not console.is_terminal and "width" not in options:
        console.width = _UNFOLDED
    return console


def run_table(runs: Iterable[RunView]) -> Table:
    """Returns one row per run."""
    table = _table("run", "state", ">done", ">failed", ">round", ">version", "created")
    for view in runs:
        done = f"{view.rounds_done}/{view.settings.rounds}"
        figures = (done, view.rounds_failed, _or_dash(view.round), view.version, _when(view.created))
        table.add_row(view.run, _state(view.state), *map(str, figures))
    return table


def round_table(rounds: Iterable[RoundView]) -> Table:
    """Returns one row per round; figures are example-weighted means over its devices."""
    table = _table("round", "state", ">reported", ">leased", ">loss", ">accuracy", ">density", "reason")
    for view in rounds:
        density = sum(view.density) / len(view.density) if view.density else None
        counts = (f"{view.reported}/{view.target}", str(view.leased))
        figures = (_figure(view.loss), _figure(view.accuracy), _figure(density))
        table.add_row(str(view.round), _state(view.state), *counts, *figures, view.reason or "")
    return table


def run_card(view: RunView, open_round: RoundView | None) -> RenderableType:
    """Returns a run and its open round, one fact per line."""
    card = Table.grid(padding=(0, 2))
    settings = view.settings
    facts: list[tuple[str, RenderableType]] = [
        ("run", view.run),
        ("state", _state(view.state)),
        ("rounds", f"{view.rounds_done} of {settings.rounds} aggregated, {view.rounds_failed} failed"),
        ("version", str(view.version)),
        ("bundle", view.settings.bundle),
        ("layout", view.layout),
        ("created", _when(view.created)),
    ]
    if open_round:
        counts = f"{open_round.reported} of {open_round.target} reported, {open_round.leased} slots taken"
        facts.append((f"round {open_round.round}", f"{counts}, open until {_when(open_round.deadline)}"))
    for name, fact in facts:
        card.add_row(Text(name, style="dim"), fact)
    return card


def screen(progress: Progress) -> RenderableType:
    """Returns the live view of a run: its rounds, the open round, and how the last rounds ended."""
    bars = Table.grid(padding=(0, 1))
    bars.add_row(
        progress.run,
        _state(progress.state),
        _bar(progress.done, progress.rounds),
        f"{progress.done}/{progress.rounds} rounds"
        + (f", {progress.failed} failed" if progress.failed else ""),
    )
    if progress.round is not None:
        counts = f"{len(progress.reported)}/{progress.target} reported, {len(progress.training)} training"
        bars.add_row(
            f"round {progress.round}", _state("open"), _bar(len(progress.reported), progress.target), counts
        )
    closed = _table("round", "state", ">reported", ">loss", ">accuracy", ">density", "reason")
    for outcome in progress.outcomes:
        figures = (_figure(outcome.loss), _figure(outcome.accuracy), _figure(outcome.density))
        closed.add_row(
            str(outcome.round), _state(outcome.state), str(outcome.reported), *figures, outcome.reason
        )
    note = Text(progress.note, style="yellow")
    return Group(bars, *([note] if progress.note else []), *([closed] if progress.outcomes else []))


def show(target: Console, progress: Progress, events: Iterable[Event]) -> Progress:
    """Returns the progress after the last event; until then it is drawn on `target` as it changes."""
    with Live(screen(progress), console=target, refresh_per_second=8) as live:
        for event in events:
            progress = progress.after(event)
            live.update(screen(progress))
    return progress


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            column.lstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=right
        )
    return table


def _bar(done: int, of: int) -> ProgressBar:
    return ProgressBar(total=of, completed=min(done, of), width=30)


def _state(state: str) -> Text:
    return Text(state, style=_COLOURS.get(state, ""))


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _or_dash(value: int | None) -> str:
    return "-" if value is None else str(value)


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(" ", "seconds")
