"""Runs as rows: how a run's state is read from the tables, and how a change of it is written.

Functions on a connection inside a transaction, whose limits are the store's business.
"""

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeAlias

from sqlalchemy import Connection, Row, Table, and_, bindparam, insert, null, select, update

from server_api import tables
from server_api.rounds import Data, Effect, Round, Run
from server_api.store import Change, RunRecord, Update
from server_api.summary import Report
from spafl.protocol import Event, Metrics, RoundView, RunSettings

Values: TypeAlias = dict[str, Any]

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

_TABLES = tables.metadata.sorted_tables
_INSERT = {table.name: insert(table) for table in _TABLES}
# the parameters that name the row: `key_` and its column, for a column's own name would set it
_UPDATE = {
    table.name: update(table).where(
        *(column == bindparam(f"key_{column.name}") for column in table.primary_key)
    )
    for table in _TABLES
}


class Rows:
    """Rows to be written together on `connection`: many of a kind in one statement, as databases like it."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._inserts: defaultdict[str, list[Values]] = defaultdict(list)
        self._updates: defaultdict[str, list[Values]] = defaultdict(list)

    def insert(self, table: Table, values: Values) -> None:
        """Returns nothing; the row is written by `write`."""
        self._inserts[table.name].append(values)

    def update(self, table: Table, key: Values, values: Values) -> None:
        """Returns nothing; `write` sets `values` in the row of `key` after the inserts, per table in order of calls."""
        self._updates[table.name].append({**{f"key_{name}": part for name, part in key.items()}, **values})

    def write(self) -> None:
        """Returns nothing; everything is written."""
        for table in _TABLES:
            if rows := self._inserts.pop(table.name, None):
                self.connection.execute(_INSERT[table.name], rows)
        for table in _TABLES:
            # rows that set the same columns go together
            for _, alike in groupby(self._updates.pop(table.name, ()), key=tuple):
                self.connection.execute(_UPDATE[table.name], list(alike))


@dataclass(frozen=True, slots=True)
class RowJournal:
    """A run's journal, read in the transaction of `rows`."""

    rows: Rows
    name: str

    def updates(self, round: int) -> Iterator[Update]:
        """Yields the counted updates of a round by ascending device id, a few at a time."""
        self.rows.write()
        for row in self.rows.connection.execute(_UPDATES, {"name": self.name, "number": round}):
            report = Report(row.digest, Metrics.from_text(row.metrics))
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
    settings = known.run.settings if known else RunSettings.from_text(row.settings)
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


def add_change(rows: Rows, record: RunRecord, change: Change, now: float) -> RunRecord:
    """Returns the run after `change`, whose rows are added to `rows`."""
    run, effects = change.step.run, change.step.effects
    name, revision = run.settings.name, record.revision + len(effects)
    if not effects:
        return record
    for effect in effects:
        _add_effect(rows, record.run, effect, change, now)
    add_events(rows, name, record.revision, effects, now)
    rows.update(tables.runs, {"run": name}, {"revision": revision, **run_values(run)})
    return RunRecord(run, record.layout, record.created, revision)


def add_events(rows: Rows, name: str, last: int, effects: tuple[Effect, ...], now: float) -> None:
    """Returns nothing; the effects are the run's events numbered from `last` + 1."""
    for id, effect in enumerate(effects, last + 1):
        event = {"run": name, "id": id, "time": now, "kind": effect.kind, "round": effect.round}
        data = json.dumps(effect.data, allow_nan=False)
        rows.insert(tables.events, {**event, "device": effect.device, "data": data})


def run_values(run: Run) -> Values:
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
        reports={row.device: Report(row.digest, Metrics.from_text(row.metrics)) for row in reports},
    )


def _add_effect(rows: Rows, before: Run, effect: Effect, change: Change, now: float) -> None:
    name, data = before.settings.name, effect.data
    key: Values = {"run": name, "round": effect.round}
    match effect.kind:
        case "round.opened":
            rows.insert(tables.rounds, {**key, "state": "open", "opened": now, "extended": False, **data})
        case "round.extended" | "run.resumed" if change.step.run.round is not None:
            round = change.step.run.round
            values: Values = {"deadline": round.deadline, "extended": round.extended}
            rows.update(tables.rounds, {"run": name, "round": round.number}, values)
        case "round.aggregated":
            _close_round(rows, key, "aggregated", data, now)
            version = {"run": name, "version": data["version"], "body": change.thresholds}
            rows.insert(tables.thresholds, version)
        case "round.failed":
            _close_round(rows, key, "failed", data, now)
        case "lease.granted":
            _add_lease(rows, before, effect, key)
            said = change.capabilities.to_text() if change.capabilities else None
            seen = {"last_seen": now} | ({"capabilities": said} if said else {})
            rows.update(tables.devices, {"device": effect.device}, seen)
        case "lease.expired":
            rows.update(tables.leases, {**key, "device": effect.device}, {"lapsed": True})
        case "update.accepted":
            _add_update(rows, name, change)
            rows.update(tables.devices, {"device": effect.device}, {"last_seen": now})


def _close_round(rows: Rows, key: Values, state: str, data: Data, now: float) -> None:
    figures = {figure: value for figure, value in data.items() if figure != "version"}
    closed = {"state": state, "closed": now, "figures": json.dumps(figures, allow_nan=False)}
    rows.update(tables.rounds, key, closed)


def _add_lease(rows: Rows, before: Run, effect: Effect, key: Values) -> None:
    values = {"expires": effect.data["expires"], "lapsed": False}
    round = before.round
    again = (
        round is not None
        and round.number == effect.round
        and (effect.device in round.leases or effect.device in round.lapsed)
    )
    if again:
        rows.update(tables.leases, {**key, "device": effect.device}, values)
    else:
        rows.insert(tables.leases, {**key, "device": effect.device, **values})


def _add_update(rows: Rows, name: str, change: Change) -> None:
    counted = change.update
    assert counted is not None, "an accepted update comes with its bytes"
    row = {
        "run": name,
        "round": counted.round,
        "device": counted.device,
        "digest": counted.report.digest,
        "metrics": json.dumps(counted.report.metrics.present(), separators=(",", ":")),
        "body": counted.body,
    }
    rows.insert(tables.updates, row)
