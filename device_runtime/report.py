"""What an agent tells while it works: events as JSON lines for programs, or progress on a terminal for people.

Every event is one object {"time": seconds since the epoch, "event": name, ...}; names and keys are stable:

    enrolled           device, server
    waiting            reason, seconds               nothing to do now, or no server
    held               reasons                       the policy's conditions are not met
    round.leased       round, version, expires
    bundle.ready       bundle, model
    round.begun        round, version, density, collapsed
    round.resumed      round, epoch, batch, steps
    epoch              round, epoch, loss, accuracy, examples, seconds
    checkpoint         round, steps
    round.trained      round, loss, accuracy, density, steps, dropped, seconds
    round.diverged     round, reason
    update.accepted    round, bytes
    update.late        round, reason                 not counted; the training stays in the weights
    finished           run, updates                  the run is over, or the rounds asked for are done
    stopped            phase                         by a signal; the state is saved
"""

import sys
import time
from collections.abc import Mapping
from json import dumps
from types import TracebackType
from typing import IO, Protocol, Self


class Report(Protocol):
    """Where an agent's events and progress go."""

    def event(self, name: str, **fields: object) -> None:
        """Returns nothing; `fields` are told as event `name`."""

    def step(self, title: str, done: int, total: int, loss: float) -> None:
        """Returns nothing; step `done` of `total` of what `title` names was trained with task loss `loss`."""


class JsonLines:
    """Events as JSON, one per line of `stream`; steps stay untold."""

    def __init__(self, stream: IO[str] | None = None) -> None:
        self._stream = stream or sys.stdout

    def event(self, name: str, **fields: object) -> None:
        """Returns nothing; one line is written and flushed."""
        line = {"time": round(time.time(), 3), "event": name, **fields}
        self._stream.write(dumps(line) + "\n")
        self._stream.flush()

    def step(self, title: str, done: int, total: int, loss: float) -> None:
        """Returns nothing."""


class Terminal:
    """Events as lines and steps as one progress bar; use it in a `with`."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            transient=True,
        )
        self._task = self._progress.add_task("", visible=False, total=None, loss=0.0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def event(self, name: str, **fields: object) -> None:
        """Returns nothing; one line is printed above the bar."""
        text = "  ".join(
            f"{key} {_short(value)}" for key, value in fields.items() if value not in (None, (), [])
        )
        self._progress.console.print(
            f"{time.strftime('%H:%M:%S')}  {name:<16} {text}", markup=False, highlight=True
        )

    def step(self, title: str, done: int, total: int, loss: float) -> None:
        """Returns nothing; the bar moves, and goes when `done` is `total`."""
        self._progress.update(
            self._task, description=title, completed=done, total=total, loss=loss, visible=done < total
        )


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(_short(item) for item in value)
    if isinstance(value, Mapping):
        return "  ".join(f"{name} {_short(item)}" for name, item in value.items())
    return "-" if value is None else str(value)


def print_facts(facts: Mapping[str, object], *, json: bool) -> None:
    """Returns nothing; `facts` are printed as one line of JSON, or as a line each."""
    if json:
        sys.stdout.write(dumps(facts) + "\n")
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        sys.stdout.write(f"{name:<{width}}  {_short(value)}\n")
