"""The live view of a demo: stages, the round, and a line per device. On no terminal, a line per stage and round."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from spafl.protocol import Event

_BARS = "▁▂▃▄▅▆▇█"
_STYLES = {"training": "yellow", "reported": "green", "compact": "cyan", "training alone": "magenta"}


@dataclass(slots=True)
class _Line:
    """A device on the screen."""

    examples: int
    doing: str = ""
    rounds: int = 0
    accuracy: float | None = None
    density: float | None = None


@dataclass(slots=True)
class Screen:
    """What is shown, changed as things happen; live inside a `with`.

    rounds, per_round   of the run, for its bars
    """

    rounds: int
    per_round: int
    console: Console = field(default_factory=lambda: Console(stderr=True))
    seconds: dict[str, float] = field(default_factory=dict)
    _devices: dict[str, _Line] = field(default_factory=dict)
    _history: list[tuple[float | None, float]] = field(default_factory=list)
    _stage: str | None = None
    _since: float = 0.0
    _round: int = 0
    _leased: int = 0
    _reported: int = 0
    _live: Live | None = None

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self.console, refresh_per_second=8)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Returns a context in which `name` is what goes on; its seconds are kept."""
        self._stage, self._since = name, time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - self._since, 2)
        self._stage = None
        self._say(f"{name:<32} {self.seconds[name]:6.1f} s")

    def devices(self, examples: dict[str, int]) -> None:
        """Returns nothing; the devices and their numbers of examples are shown from now on."""
        self._devices = {name: _Line(count) for name, count in examples.items()}

    def doing(self, device: str, what: str) -> None:
        """Returns nothing; `what` stands beside the device."""
        self._devices[device].doing = what

    def heard(self, device: str, event: dict[str, Any]) -> None:
        """Returns nothing; a JSON line of the device's process is shown."""
        line = self._devices[device]
        match event.get("event"):
            case "round.begun" | "round.resumed":
                line.doing = "training"
            case "epoch":
                line.doing = f"training, epoch {event['epoch'] + 1}"
            case "round.trained":
                line.accuracy = event.get("accuracy")
                if event["density"]:
                    line.density = sum(event["density"]) / len(event["density"])
            case "update.accepted":
                line.doing, line.rounds = "reported", line.rounds + 1
            case "waiting" | "round.diverged" as kind:
                line.doing = f"{kind}: {event.get('reason', '')}"[:40]

    def happened(self, event: Event) -> None:
        """Returns nothing; an event of the run is shown."""
        match event.kind:
            case "round.opened":
                self._round, self._leased, self._reported = event.round or 0, 0, 0
            case "lease.granted":
                self._leased += 1
            case "update.accepted":
                self._reported += 1
            case "round.aggregated":
                accuracy, density = event.data.get("accuracy"), event.data.get("density")
                shares = density if isinstance(density, list) else []
                self._history.append(
                    (
                        accuracy if isinstance(accuracy, float) else None,
                        sum(shares) / len(shares) if shares else 1.0,
                    )
                )
                self._say(f"round {event.round:>3} of {self.rounds}   {self._latest()}")

    def _say(self, text: str) -> None:
        if self._live is None:
            self.console.print(text, highlight=False)

    def _latest(self) -> str:
        accuracy, density = self._history[-1]
        shown = "      " if accuracy is None else f"{accuracy:6.1%}"
        return f"accuracy {shown}   density {density:6.1%}"

    def _render(self) -> RenderableType:
        done = Table.grid(padding=(0, 2))
        for name, seconds in self.seconds.items():
            done.add_row("[green]✓[/]", name, f"{seconds:.1f} s")
        if self._stage is not None:
            done.add_row("[yellow]▸[/]", self._stage, f"{time.monotonic() - self._since:.0f} s")
        parts: list[RenderableType] = [done]
        if self._round:
            parts += [Text(), self._run()]
        if self._devices:
            parts += [Text(), self._device_table()]
        return Group(*parts)

    def _run(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=self.rounds, completed=len(self._history), width=30)
        table.add_row("round", bar, f"{min(self._round, self.rounds)} of {self.rounds}")
        bar = ProgressBar(total=self.per_round, completed=self._reported, width=30)
        table.add_row("reports", bar, f"{self._reported} of {self.per_round}, {self._leased} leased")
        if self._history:
            known = [accuracy for accuracy, _ in self._history if accuracy is not None]
            table.add_row("accuracy", _spark(known), f"{known[-1]:.1%}" if known else "")
            density = [share for _, share in self._history]
            table.add_row("density", _spark(density), f"{density[-1]:.1%}")
        return table

    def _device_table(self) -> RenderableType:
        table = Table("device", box=None, header_style="bold", padding=(0, 2, 0, 0))
        for heading in ("examples", "rounds", "accuracy", "density"):
            table.add_column(heading, justify="right")
        table.add_column("", min_width=20)
        for name, line in self._devices.items():
            table.add_row(
                name,
                str(line.examples),
                str(line.rounds),
                "" if line.accuracy is None else f"{line.accuracy:.1%}",
                "" if line.density is None else f"{line.density:.1%}",
                Text(line.doing, style=_STYLES.get(line.doing.partition(",")[0], "dim")),
            )
        return table


def _spark(shares: list[float]) -> str:
    """Returns the last shares as bars, 0 to 1."""
    return "".join(_BARS[min(7, int(share * 8))] for share in shares[-30:])
