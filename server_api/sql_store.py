"""The store on a SQL database, by SQLAlchemy. What only SQLite needs is in `server_api.sqlite`."""

import hmac
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

from sqlalchemy import URL, Connection, Row, create_engine, delete, func, insert, make_url, select, text
from sqlalchemy.exc import ArgumentError, IntegrityError, OperationalError, SQLAlchemyError

from server_api import run_rows, sqlite, tables
from server_api.errors import NotFound, StoreBusy
from server_api.migrations import upgrade
from server_api.rounds import Effect, Run
from server_api.run_rows import RowJournal
from server_api.store import Change, Decision, Principal, Role, RunRecord, Store, Update
from spafl.errors import SettingsError
from spafl.protocol import BundleView, Capabilities, DeviceView, Event, RoundView, RunSettings

_BUNDLE = [column for column in tables.bundles.c if column.name != "manifest"]
_CONNECTIONS = 50
"""More than the 40 threads requests run on, so that nobody waits for one."""


@dataclass(slots=True)
class _Wish:
    """A change somebody waits for."""

    name: str
    now: float
    decide: Decision
    answer: Future[Change] = field(default_factory=Future)


class SqlStore(Store):
    """A store in the database at `url`, brought to today's schema first.

    One thread writes the changes. Those submitted while it writes are written next in one transaction: one commit,
    and so one wait for the disk, for all of them.

    Raises:
        SettingsError: the URL is not a database this version knows, or cannot be opened.
    """

    def __init__(self, url: str | URL) -> None:
        try:
            parsed = make_url(url)
        except ArgumentError as error:
            raise SettingsError("the database is not a URL: expected sqlite:///path/to/file.db") from error
        if parsed.get_backend_name() != "sqlite" or parsed.database in (None, "", ":memory:"):
            raise SettingsError(
                f"database {parsed.render_as_string()}: this version stores in sqlite:///path/to/file.db"
            )
        self._engine = create_engine(parsed, pool_size=_CONNECTIONS, max_overflow=0, hide_parameters=True)
        sqlite.prepare(self._engine)
        self._writer = self._engine.execution_options(**{sqlite.WRITES: True})
        self._wishes: SimpleQueue[_Wish | None] = SimpleQueue()
        self._known: dict[str, RunRecord] = {}
        try:
            with self._writing() as connection:
                upgrade(connection)
        except (StoreBusy, SQLAlchemyError) as error:
            raise SettingsError(f"cannot open database {parsed.render_as_string()}: {error}") from error
        self._writes = threading.Thread(target=self._write_wishes, name="store", daemon=True)
        self._writes.start()

    def close(self) -> None:
        """Returns nothing; what was submitted is stored, connections are closed. The store must not be used again."""
        self._wishes.put(None)
        self._writes.join()
        self._engine.dispose()

    def ping(self) -> None:
        """Returns nothing if the database answers."""
        with self._reading() as connection:
            connection.execute(text("SELECT 1"))

    def has_token(self, role: Role) -> bool:
        """Returns whether any token of `role` was ever set."""
        query = select(tables.tokens.c.digest).where(tables.tokens.c.role == role).limit(1)
        with self._reading() as connection:
            return connection.execute(query).first() is not None

    def replace_tokens(self, role: Role, digest: str) -> None:
        """Returns nothing; from now on the token of SHA-256 `digest` is the only one of `role`."""
        with self._writing() as connection:
            connection.execute(delete(tables.tokens).where(tables.tokens.c.role == role))
            connection.execute(insert(tables.tokens), {"digest": digest, "role": role})

    def principal(self, digest: str) -> Principal | None:
        """Returns whom the token of SHA-256 `digest` belongs to, None if it is unknown."""
        # found by half of the digest, decided by all of it: the time taken tells nothing about the other half
        half = digest[:32]
        query = select(tables.tokens).where(tables.tokens.c.digest.between(half, half + "g"))
        with self._reading() as connection:
            row = connection.execute(query).one_or_none()
        known = row is not None and hmac.compare_digest(row.digest, digest)
        return Principal(row.role, row.device or "") if row is not None and known else None

    def add_device(
        self, device: str, name: str | None, capabilities: Capabilities, digest: str, now: float
    ) -> None:
        """Returns nothing; `device` is enrolled with the token of SHA-256 `digest`."""
        row = {"device": device, "name": name, "created": now}
        with self._writing() as connection:
            connection.execute(insert(tables.devices), {**row, "capabilities": capabilities.to_text()})
            connection.execute(insert(tables.tokens), {"digest": digest, "role": "device", "device": device})

    def devices(self, after: str, limit: int) -> list[DeviceView]:
        """Returns up to `limit` devices with ids above `after`, by id."""
        counted = (
            select(func.count())
            .select_from(tables.updates)
            .where(tables.updates.c.device == tables.devices.c.device)
            .scalar_subquery()
        )
        query = (
            select(tables.devices, counted.label("updates"))
            .where(tables.devices.c.device > after)
            .order_by(tables.devices.c.device)
            .limit(limit)
        )
        with self._reading() as connection:
            return [
                DeviceView(
                    device=row.device,
                    name=row.name,
                    created=row.created,
                    last_seen=row.last_seen,
                    capabilities=Capabilities.from_text(row.capabilities),
                    updates=row.updates,
                )
                for row in connection.execute(query)
            ]

    def add_bundle(self, bundle: BundleView, manifest: bytes) -> bool:
        """Returns whether the bundle is new; one that is already there stays as it is."""
        try:
            with self._writing() as connection:
                connection.execute(insert(tables.bundles), {**bundle.to_json(), "manifest": manifest})
        except IntegrityError:
            return False
        return True

    def bundle(self, id: str) -> BundleView | None:
        """Returns a bundle, None if there is none."""
        with self._reading() as connection:
            row = connection.execute(select(*_BUNDLE).where(tables.bundles.c.id == id)).one_or_none()
        return None if row is None else _bundle_view(row)

    def manifest(self, id: str) -> bytes | None:
        """Returns a bundle's manifest.json, None if there is no such bundle."""
        query = select(tables.bundles.c.manifest).where(tables.bundles.c.id == id)
        with self._reading() as connection:
            return connection.execute(query).scalar_one_or_none()

    def bundles(self) -> list[BundleView]:
        """Returns every bundle, the newest first."""
        query = select(*_BUNDLE).order_by(tables.bundles.c.created.desc(), tables.bundles.c.id)
        with self._reading() as connection:
            return [_bundle_view(row) for row in connection.execute(query)]

    def add_run(self, settings: RunSettings, layout: str, thresholds: bytes, now: float) -> bool:
        """Returns whether the run is new, with its first event written and `thresholds` stored as version 0."""
        name, run = settings.name, Run(settings)
        row = {
            "run": name,
            "settings": settings.to_text(),
            "bundle": settings.bundle,
            "layout": layout,
            "created": now,
            "revision": 1,
            **run_rows.run_values(run),
        }
        try:
            with self._writing() as connection:
                connection.execute(insert(tables.runs), row)
                connection.execute(insert(tables.thresholds), {"run": name, "version": 0, "body": thresholds})
                rows = run_rows.Rows(connection)
                run_rows.add_events(rows, name, 0, (Effect("run.created"),), now)
                rows.write()
        except IntegrityError:
            if self.run(name) is None:
                raise
            return False
        return True

    def run(self, name: str) -> RunRecord | None:
        """Returns a run, None if there is none of that name."""
        with self._reading() as connection:
            return run_rows.load_run(connection, name, self._known.get(name))

    def runs(self, *, live: bool = False) -> list[RunRecord]:
        """Returns every run, the newest first; with `live` only those that are neither finished nor stopped."""
        query = select(tables.runs.c.run).order_by(tables.runs.c.created.desc(), tables.runs.c.run)
        if live:
            query = query.where(tables.runs.c.state.not_in(("finished", "stopped")))
        with self._reading() as connection:
            names = connection.execute(query).scalars().all()
            records = (run_rows.load_run(connection, name, self._known.get(name)) for name in names)
            return [record for record in records if record is not None]

    def submit(self, name: str, now: float, decide: Decision) -> Future[Change]:
        """Returns at once; its result is what `decide` made of the run's state, once everything of it is stored."""
        wish = _Wish(name, now, decide)
        self._wishes.put(wish)
        return wish.answer

    def _write_wishes(self) -> None:
        while True:
            # whatever was asked for while the last transaction was written is written in one
            wishes = [self._wishes.get(), *(self._wishes.get_nowait() for _ in range(self._wishes.qsize()))]
            asked = [wish for wish in wishes if wish is not None]
            # an answer nobody waits for any more is cancelled, and so is the wish
            self._write([wish for wish in asked if wish.answer.set_running_or_notify_cancel()])
            if len(asked) < len(wishes):
                return

    def _write(self, wishes: list[_Wish]) -> None:
        records: dict[str, RunRecord] = {}
        answers: list[Change | Exception] = []
        try:
            with self._writing() as connection:
                rows = run_rows.Rows(connection)
                for wish in wishes:
                    answers.append(self._fulfil(rows, records, wish))
                rows.write()
        except StoreBusy as error:
            for wish in wishes:
                wish.answer.set_exception(error)
            return
        except Exception as error:
            if len(wishes) == 1:
                wishes[0].answer.set_exception(error)
            else:  # one of them is at fault: the others must not suffer for it
                for wish in wishes:
                    self._write([wish])
            return
        self._known |= records
        for wish, answer in zip(wishes, answers, strict=True):
            if isinstance(answer, Exception):
                wish.answer.set_exception(answer)
            else:
                wish.answer.set_result(answer)

    def _fulfil(self, rows: run_rows.Rows, records: dict[str, RunRecord], wish: _Wish) -> Change | Exception:
        record = records.get(wish.name) or run_rows.load_run(
            rows.connection, wish.name, self._known.get(wish.name), lock=True
        )
        if record is None:
            return NotFound(f"there is no run {wish.name!r}")
        try:
            change = wish.decide(record.run, RowJournal(rows, wish.name))
        except SQLAlchemyError:
            raise
        except Exception as error:  # a refusal, or a defect: this wish's alone, it has written nothing
            return error
        records[wish.name] = run_rows.add_change(rows, record, change, wish.now)
        return change

    def rounds(self, name: str, after: int, limit: int) -> list[RoundView]:
        """Returns up to `limit` closed rounds with numbers above `after`, by number."""
        query = (
            select(tables.rounds)
            .where(
                tables.rounds.c.run == name, tables.rounds.c.round > after, tables.rounds.c.state != "open"
            )
            .order_by(tables.rounds.c.round)
            .limit(limit)
        )
        with self._reading() as connection:
            record = run_rows.load_run(connection, name, self._known.get(name))
            if record is None:
                return []
            return [run_rows.closed_round(row, record.run.settings) for row in connection.execute(query)]

    def thresholds(self, name: str, version: int) -> bytes | None:
        """Returns the body of a version of the run's global thresholds, None if there is none."""
        query = select(tables.thresholds.c.body).where(
            tables.thresholds.c.run == name, tables.thresholds.c.version == version
        )
        with self._reading() as connection:
            return connection.execute(query).scalar_one_or_none()

    def counted(self, name: str, round: int, device: str) -> str | None:
        """Returns the digest of the update of `device` counted in a round, None if none is."""
        query = select(tables.updates.c.digest).where(
            tables.updates.c.run == name, tables.updates.c.round == round, tables.updates.c.device == device
        )
        with self._reading() as connection:
            return connection.execute(query).scalar_one_or_none()

    def updates(self, name: str, round: int) -> Iterator[Update]:
        """Yields the counted updates of a round by ascending device id."""
        with self._reading() as connection:
            yield from RowJournal(run_rows.Rows(connection), name).updates(round)

    def events(self, name: str, after: int, limit: int) -> list[Event]:
        """Returns up to `limit` events of a run with ids above `after`, by id."""
        query = (
            select(tables.events)
            .where(tables.events.c.run == name, tables.events.c.id > after)
            .order_by(tables.events.c.id)
            .limit(limit)
        )
        with self._reading() as connection:
            return [run_rows.event(row) for row in connection.execute(query)]

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except OperationalError as error:
            raise StoreBusy(f"the database cannot be read now: {error.orig}") from error

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        try:
            with self._writer.begin() as connection:
                yield connection
        except OperationalError as error:
            raise StoreBusy(f"the database cannot be written now: {error.orig}") from error


def _bundle_view(row: Row[tuple[object, ...]]) -> BundleView:
    return BundleView.from_json(dict(row._mapping))
