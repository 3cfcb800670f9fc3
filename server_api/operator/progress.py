"""What a run's events add up to. Pure: events in, figures out."""

from dataclasses import dataclass, field, replace
from typing import Self

from spafl.protocol import Event, RunView

SHOWN_ROUNDS = 12


@dataclass(frozen=True, slots=True)
class Outcome:
    """A closed round: how it ended, who took part, and its example-weighted figures where devices told them.

    density   mean over the layers of the share of active filters
    """

    round: int
    state: str
    leased: int
    reported: int
    loss: float | None = None
    accuracy: float | None = None
    density: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """A run as far as its events were seen.

    round      the open round's number, None between rounds
    training   devices that hold a lease of it and have not reported
    reported   devices whose update it counts
    note       why the run is paused, if it said why
    """

    run: str
    rounds: int
    target: int
    state: str = "created"
    done: int = 0
    failed: int = 0
    round: int | None = None
    training: frozenset[str] = frozenset()
    reported: frozenset[str] = frozenset()
    outcomes: tuple[Outcome, ...] = field(default=())
    note: str = ""

    @classmethod
    def of(cls, view: RunView) -> Self:
        """Returns the progress of a run before its first event."""
        return cls(view.run, view.settings.rounds, view.settings.target)

    def after(self, event: Event) -> "Progress":
        """Returns the progress once `event` has happened; of closed rounds the last `SHOWN_ROUNDS` are kept."""
        device = frozenset({event.device} if event.device else ())
        match event.kind:
            case "run.started" | "run.resumed":
                return replace(self, state="running", note="")
            case "run.paused":
                return replace(self, state="paused", note=str(event.data.get("reason") or ""))
            case "run.finished" | "run.stopped":
                return replace(self, state=event.kind.removeprefix("run."), round=None, note="")
            case "round.opened":
                return replace(self, round=event.round, training=frozenset(), reported=frozenset())
            case "lease.granted":
                return replace(self, training=self.training | device)
            case "lease.expired":
                return replace(self, training=self.training - device)
            case "update.accepted":
                return replace(self, training=self.training - device, reported=self.reported | device)
            case "round.aggregated" | "round.failed":
                return self._closed(event)
            case _:
                return self

    def _closed(self, event: Event) -> "Progress":
        outcome = Outcome(
            round=event.round or 0,
            state=event.kind.removeprefix("round."),
            leased=int(_number(event, "leased") or 0),
            reported=int(_number(event, "reported") or 0),
            loss=_number(event, "loss"),
            accuracy=_number(event, "accuracy"),
            density=_mean(event.data.get("density")),
            reason=str(event.data.get("reason") or ""),
        )
        aggregated = outcome.state == "aggregated"
        return replace(
            self,
            round=None,
            done=self.done + aggregated,
            failed=self.failed + (not aggregated),
            training=frozenset(),
            reported=frozenset(),
            outcomes=(*self.outcomes, outcome)[-SHOWN_ROUNDS:],
        )


def _number(event: Event, name: str) -> float | None:
    value = event.data.get(name)
    return float(value) if isinstance(value, int | float) else None


def _mean(values: object) -> float | None:
    return sum(values) / len(values) if isinstance(values, list) and values else None
