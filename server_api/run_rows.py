"""Runs as rows: how a run's state is read from the tables, and how a change of it is written.

Functions on a connection inside a transaction, whose limits are the store's business.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, and_, bindparam, insert, null, select, update

from server_api import tables
from server_api.rounds import Effect, Round, Run
from server_api.store import Change, RunRecord, Update
from server_api.summary import Report
from spafl.protocol import Event, Metrics, RoundView, RunSettings

_RUN = select(tables.runs).where(tables.runs.c.run == bindparam("name"))
_ROUND = select(tables.rounds).where(
    tables.rounds.c.run == bindparam("name"), tables.rounds.c.round == bindparam("number")
)
_LEASES = (
    select(tables.leases.c.device, tables.leases.c.expires, tables.leases.c.lapsed)
    .select_from(
        tables.leases.outerjoin(
            tables.updates,
            and_(
                tables.updates.c.run == tables.leases.c.run,
                tables.updates.c.round == tables.leases.c.round,
                tables.updates.c.device == tables.leases.c.device,
            ),
        )
    )
    .where(
        tables.leases.c.run == bindparam("name"),
        tables.leases.c.round == bindparam("number"),
        tables.updates.c.device == null(),
    )
)
_REPORTS = (
    select(tables.updates.c.device, tables.updates.c.digest, tables.updates.c.metrics)
    .where(tables.updates.c.run == bindparam("name"), tables.updates.c.round == bindparam("number"))
    .order_by(tables.updates.c.device)
)
_UPDATES = _REPORTS.add_columns(tables.updates.c.body).execution_options(yield_per=64)

_NAMED_RUN = tables.runs.c.run == bindparam("name")
_NAMED_ROUND = and_(tables.rounds.c.run == bindparam("name"), tables.rounds.c.round == bindparam("number"))
_NAMED_LEASE = and_(
    tables.leases.c.run == bindparam("name"),
    tables.leases.c.round == bindparam("number"),
    tables.leases.c.device == bindparam("holder"),
)
_UPDATE_RUN = update(tables.runs).where(_NAMED_RUN)
_UPDATE_ROUND = update(tables.rounds).where(_NAMED_ROUND)
_UPDATE_LEASE = update(tables.leases).where(_NAMED_LEASE)
_UPDATE_DEVICE = update(tables.devices).where(tables.devices.c.device == bindparam("holder"))


@dataclass(frozen=True, slots=True)
class RowJournal:
    """A run's journal, read on the connection of the transaction it was made for."""

    connection: Connection
    name: str

    def updates(self, round: int) -> Iterator[Update]:
        """Yields the counted updates of a round by ascending device id, a few at a time."""
        for row in self.connection.execute(_UPDATES, {"name": self.name, "number": round}):
            report = Report(row.digest, Metrics.model_validate_json(row.metrics))
            yield Update(round, row.device, report, row.body)


def load_run(
    connection: Connection, name: str, known: RunRecord | None, *, lock: bool = False
) -> RunRecord | None:
    """Returns the run `name`, `known` itself if that is still current; None if there is no such run.

    lock   no other transaction may change the run until this one ends
    """
    row = connection.execute(_RUN.with_for_update() if lock else _RUN, {"name": name}).one_or_none()
    if row is None:
        return None
    if known is not None and known.revision == row.revision:
        return known
    settings = known.run.settings if known else RunSettings.model_validate_json(row.settings)
    run = Run(
        settings=settings,
        state=row.state,
        version=row.version,
        number=row.number,
        rounds_done=row.rounds_done,
        rounds_failed=row.rounds_failed,
        failures=row.failures,
        paused_since=row.paused_since,
        round=_open_round(connection, name, row.number),
    )
    return RunRecord(run, row.layout, row.created, row.revision)


def save_change(connection: Connection, record: RunRecord, change: Change, now: float) -> RunRecord:
    """Returns the run after `change`, every row of which is written."""
    run, effects = change.step.run, change.step.effects
    name, revision = run.settings.name, record.revision + len(effects)
    if not effects:
        return record
    for effect in effects:
        _save_effect(connection, record.run, effect, change, now)
    add_events(connection, name, record.revision, effects, now)
    connection.execute(_UPDATE_RUN, {"name": name, "revision": revision, **run_values(run)})
    return RunRecord(run, record.layout, record.created, revision)


def add_events(connection: Connection, name: str, last: int, effects: tuple[Effect, ...], now: float) -> None:
    """Returns nothing; the effects are the run's events numbered from `last` + 1."""
    rows = [
        {
            "run": name,
            "id": id,
            "time": now,
            "kind": effect.kind,
            "round": effect.round,
            "device": effect.device,
            "data": json.dumps(effect.data, allow_nan=False),
        }
        for id, effect in enumerate(effects, last + 1)
    ]
    connection.execute(insert(tables.events), rows)


def run_values(run: Run) -> dict[str, Any]:
    """Returns the columns of a run that change, by name."""
    return {
        "state": run.state,
        "version": run.version,
        "number": run.number,
        "rounds_done": run.rounds_done,
        "rounds_failed": run.rounds_failed,
        "failures": run.failures,
        "paused_since": run.paused_since,
    }


def closed_round(row: Row[Any], settings: RunSettings) -> RoundView:
    """Returns the view of a closed round from its row."""
    return RoundView(
        run=row.run,
        round=row.round,
        state=row.state,
        version=row.version,
        opened=row.opened,
        deadline=row.deadline,
        closed=row.closed,
        extended=row.extended,
        target=settings.target,
        minimum=settings.least,
        **json.loads(row.figures),
    )


def event(row: Row[Any]) -> Event:
    """Returns the event in a row."""
    return Event(
        id=row.id,
        time=row.time,
        run=row.run,
        kind=row.kind,
        round=row.round,
        device=row.device,
        data=json.loads(row.data),
    )


def _open_round(connection: Connection, name: str, number: int) -> Round | None:
    key = {"name": name, "number": number}
    row = connection.execute(_ROUND, key).one_or_none()
    if row is None or row.state != "open":
        return None
    leases = connection.execute(_LEASES, key).all()
    reports = connection.execute(_REPORTS, key).all()
    return Round(
        number=number,
        version=row.version,
        opened=row.opened,
        deadline=row.deadline,
        extended=row.extended,
        leases={lease.device: lease.expires for lease in leases if not lease.lapsed},
        lapsed=frozenset(lease.device for lease in leases if lease.lapsed),
        reports={row.device: Report(row.digest, Metrics.model_validate_json(row.metrics)) for row in reports},
    )


def _save_effect(connection: Connection, before: Run, effect: Effect, change: Change, now: float) -> None:
    name, data = before.settings.name, effect.data
    key: dict[str, Any] = {"name": name, "number": effect.round}
    match effect.kind:
        case "round.opened":
            row = {"run": name, "round": effect.round, "state": "open", "opened": now, "extended": False}
            connection.execute(insert(tables.rounds), {**row, **data})
        case "round.extended" | "run.resumed" if change.step.run.round is not None:
            round = change.step.run.round
            key = {"name": name, "number": round.number}
            values: dict[str, Any] = {"deadline": round.deadline, "extended": round.extended}
            connection.execute(_UPDATE_ROUND, {**key, **values})
        case "round.aggregated" | "round.failed":
            figures = {figure: value for figure, value in data.items() if figure != "version"}
            state = effect.kind.removeprefix("round.")
            values = {"state": state, "closed": now, "figures": json.dumps(figures, allow_nan=False)}
            connection.execute(_UPDATE_ROUND, {**key, **values})
            if state == "aggregated":
                version = {"run": name, "version": data["version"], "body": change.thresholds}
                connection.execute(insert(tables.thresholds), version)
        case "lease.granted":
            _save_lease(connection, before, effect)
            seen: dict[str, Any] = {"holder": effect.device, "last_seen": now}
            if change.capabilities is not None:
                seen["capabilities"] = change.capabilities.model_dump_json()
            connection.execute(_UPDATE_DEVICE, seen)
        case "lease.expired":
            connection.execute(_UPDATE_LEASE, {**key, "holder": effect.device, "lapsed": True})
        case "update.accepted":
            _save_update(connection, name, change)
            connection.execute(_UPDATE_DEVICE, {"holder": effect.device, "last_seen": now})


def _save_lease(connection: Connection, before: Run, effect: Effect) -> None:
    name, device = before.settings.name, effect.device
    values = {"expires": effect.data["expires"], "lapsed": False}
    round = before.round
    if round is not None and round.number == effect.round and device in {*round.leases, *round.lapsed}:
        key = {"name": name, "number": effect.round, "holder": device}
        connection.execute(_UPDATE_LEASE, {**key, **values})
    else:
        row = {"run": name, "round": effect.round, "device": device, **values}
        connection.execute(insert(tables.leases), row)


def _save_update(connection: Connection, name: str, change: Change) -> None:
    counted = change.update
    assert counted is not None, "an accepted update comes with its bytes"
    row = {
        "run": name,
        "round": counted.round,
        "device": counted.device,
        "digest": counted.report.digest,
        "metrics": counted.report.metrics.model_dump_json(exclude_defaults=True),
        "body": counted.body,
    }
    connection.execute(insert(tables.updates), row)
