"""What the server does: the pure round machine, the mean and the store brought together."""

import heapq
import logging
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from operator import attrgetter
from pathlib import Path

import numpy as np

from server_api import errors, rounds, views
from server_api.aggregation import Contribution, mean
from server_api.bundle_files import BundleFiles
from server_api.rounds import Run, Step
from server_api.store import Change, Journal, RunRecord, Store, Update
from server_api.summary import Report
from spafl.canonical import sha256_hex
from spafl.errors import WireError
from spafl.layout import Floats, ThresholdLayout
from spafl.manifest import Manifest
from spafl.protocol import BundleView, Capabilities, Lease, Metrics, RoundView, RunSettings, RunView
from spafl.wire import Precision, Thresholds, decode_thresholds, encode_thresholds

log = logging.getLogger(__name__)

_LARGEST = {"f32": float(np.finfo(np.float32).max), "f16": float(np.finfo(np.float16).max)}


class Coordinator:
    """The rounds of every run in a store. Any method may be called from any thread.

    clock   returns the time, seconds since the epoch
    """

    def __init__(self, store: Store, files: BundleFiles, clock: Callable[[], float]) -> None:
        self.store = store
        self.files = files
        self.clock = clock
        # what never changes once it is there; a refusal is not remembered
        self.manifest = lru_cache(maxsize=64)(self._manifest)
        self.settings = lru_cache(maxsize=1024)(self._settings)
        self.thresholds = lru_cache(maxsize=8)(self._thresholds)

    def add_bundle(self, upload: Path) -> tuple[BundleView, bool]:
        """Returns the bundle in `upload`, a .zip in a directory of `files.receiving`, and whether it is new.

        Raises:
            BadBundle: it is not a whole and safe bundle.
        """
        manifest = self.files.install(upload)
        view = BundleView(
            id=manifest.id,
            name=manifest.name,
            layout=manifest.layout.id,
            thresholds=manifest.layout.size,
            bytes=sum(entry.bytes for entry in manifest.files.values()),
            created=self.clock(),
        )
        new = self.store.add_bundle(view, manifest.to_bytes())
        return self.store.bundle(view.id) or view, new

    def create(self, settings: RunSettings) -> tuple[RunView, bool]:
        """Returns the run with these settings and whether it is new; the same settings again change nothing.

        Raises:
            NotFound: the server does not hold the bundle.
            NameTaken: a run of this name has other settings.
            BadThresholds: the bundle's thresholds cannot be sent in the run's precision.
        """
        layout = self.manifest(settings.bundle).layout
        initial = Thresholds(self.files.initial_thresholds(settings.bundle), 0)
        try:
            body = encode_thresholds(layout, initial, settings.precision)
        except WireError as error:
            raise errors.BadThresholds(f"the bundle's own thresholds: {error}") from error
        new = self.store.add_run(settings, layout.id, body, self.clock())
        record = self.record(settings.name)
        if record.run.settings != settings:
            raise errors.NameTaken(f"run {settings.name} exists with other settings: choose another name")
        return views.run_view(record), new

    def record(self, name: str) -> RunRecord:
        """Returns the run `name`.

        Raises:
            NotFound: there is none.
        """
        record = self.store.run(name)
        if record is None:
            raise errors.NotFound(f"there is no run {name!r}")
        return record

    def steer(self, name: str, action: Callable[[Run, float], Step]) -> RunView:
        """Returns the run after `action`: `start`, `pause`, `resume` or `stop` of the round machine.

        Raises:
            NotFound, WrongState: as the action says.
        """
        now = self.clock()
        self._change(name, now, lambda run: action(run, now))
        return views.run_view(self.record(name))

    def close_round(self, name: str, number: int) -> RoundView:
        """Returns round `number` closed: aggregated if any device reported, else failed.

        Raises:
            NotFound: there is no such run or round.
        """
        now = self.clock()
        self._change(name, now, lambda run: rounds.close(run, number, now))
        return self.round(name, number)

    def rounds(self, name: str, after: int, limit: int) -> list[RoundView]:
        """Returns up to `limit` rounds of a run with numbers above `after`, the open one last.

        Raises:
            NotFound: there is no such run.
        """
        record = self.record(name)
        closed = self.store.rounds(name, after, limit)
        open = views.open_round(record.run)
        if open is None or open.round <= (closed[-1].round if closed else after) or len(closed) == limit:
            return closed
        return [*closed, open]

    def round(self, name: str, number: int) -> RoundView:
        """Returns round `number` of a run.

        Raises:
            NotFound: there is no such run, or it has had no such round.
        """
        found = self.rounds(name, number - 1, 1)
        if not found or found[0].round != number:
            raise errors.NotFound(f"run {name!r} has had no round {number}")
        return found[0]

    def check_in(self, name: str, device: str, capabilities: Capabilities) -> tuple[Lease, bool]:
        """Returns the lease of `device` in the open round, and whether it is new.

        Raises:
            NotFound, RunOver, RunNotStarted, RunPaused, AlreadyReported, RoundFull: as `rounds.check_in` says.
        """
        now = self.clock()
        change = self._change(
            name, now, lambda run: rounds.check_in(run, device, now), capabilities=capabilities
        )
        new = any(effect.kind == "lease.granted" for effect in change.step.effects)
        return views.lease(change.step.run, device, self.layout(name).id), new

    def report(self, name: str, number: int, device: str, body: bytes, metrics: Metrics) -> None:
        """Returns nothing once the update is counted and on disk; the same one again counts once.

        Raises:
            BadThresholds, BadMetrics: the update is not usable; nothing of it was kept.
            NotFound, RoundClosed, UpdateDiffers, LeaseExpired, NotLeased: as `rounds.report` says.
        """
        settings, layout = self.settings(name), self.layout(name)
        thresholds = _decoded(layout, body, settings.precision)
        if metrics.density and len(metrics.density) != len(layout.layers):
            raise errors.BadMetrics(
                f"densities of {len(metrics.density)} layers, expected {len(layout.layers)} or none"
            )
        digest = sha256_hex(body + b"\0" + metrics.model_dump_json().encode())
        update = Update(number, device, Report(digest, metrics), body)
        now = self.clock()
        try:
            self._change(
                name,
                now,
                lambda run: rounds.report(run, number, device, thresholds.version, update.report, now),
                update=update,
            )
        except errors.RoundClosed:
            # the answer to a counted update may have been lost: told again, the device can forget it
            counted = self.store.counted(name, number, device)
            if counted is None:
                raise
            if counted != digest:
                raise errors.UpdateDiffers(
                    f"another update of this device is counted in round {number}"
                ) from None

    def settle(self) -> None:
        """Returns nothing once everything is done that time alone asks of any run by now."""
        for record in self.store.runs(live=True):
            now = self.clock()
            if record.run.due <= now:
                self._change(record.run.settings.name, now, partial(rounds.settle, now=now))

    def _change(
        self,
        name: str,
        now: float,
        act: Callable[[Run], Step],
        update: Update | None = None,
        capabilities: Capabilities | None = None,
    ) -> Change:
        settings, layout = self.settings(name), self.layout(name)

        def decide(run: Run, journal: Journal) -> Change:
            step = act(run)
            thresholds, kinds = None, {effect.kind: effect for effect in step.effects}
            if "round.aggregated" in kinds:
                number = kinds["round.aggregated"].round
                updates = journal.updates(number or 0)
                if update is not None and "update.accepted" in kinds:
                    updates = heapq.merge(updates, [update], key=attrgetter("device"))
                thresholds = aggregated(settings, layout, updates, run.version + 1)
            return Change(step, update, thresholds, capabilities)

        change = self.store.change(name, now, decide)
        for effect in change.step.effects:
            if effect.kind.startswith(("run.", "round.")):
                log.info("run %s: %s %s %s", name, effect.kind, effect.round or "", effect.data)
        return change

    def layout(self, name: str) -> ThresholdLayout:
        """Returns the layout of the run's thresholds.

        Raises:
            NotFound: there is no such run.
        """
        return self.manifest(self.settings(name).bundle).layout

    def _manifest(self, bundle: str) -> Manifest:
        data = self.store.manifest(bundle)
        if data is None:
            raise errors.NotFound(f"there is no bundle {bundle}: upload it first")
        return Manifest.from_bytes(data)

    def _thresholds(self, name: str, version: int) -> bytes:
        body = self.store.thresholds(name, version)
        if body is None:
            raise errors.NotFound(f"run {name!r} has no thresholds of version {version}")
        return body

    def _settings(self, name: str) -> RunSettings:
        return self.record(name).run.settings


def aggregated(
    settings: RunSettings, layout: ThresholdLayout, updates: Iterable[Update], version: int
) -> bytes:
    """Returns the body of global thresholds `version`: the mean of `updates`, which ascend by device id."""
    contributions = (
        Contribution(
            update.device, update.report.metrics.examples, decode_thresholds(layout, update.body).values
        )
        for update in updates
    )
    values: Floats = mean(contributions, settings.weighting)
    return encode_thresholds(layout, Thresholds(values, version), settings.precision)


def replay(store: Store, name: str, layout: ThresholdLayout) -> Iterator[tuple[int, bytes]]:
    """Yields each version of a run's thresholds above 0 with its body, computed again from the counted updates."""
    record = store.run(name)
    after = 0
    while record is not None and (page := store.rounds(name, after, 256)):
        for round in page:
            if round.state == "aggregated":
                version = round.version + 1
                updates = store.updates(name, round.round)
                yield version, aggregated(record.run.settings, layout, updates, version)
        after = page[-1].round


def _decoded(layout: ThresholdLayout, body: bytes, precision: Precision) -> Thresholds:
    try:
        thresholds = decode_thresholds(layout, body)
    except WireError as error:
        raise errors.BadThresholds(str(error)) from error
    # the mean of such values could not be sent, and the run could not go on
    if float(np.abs(thresholds.values).max()) > _LARGEST[precision]:
        raise errors.BadThresholds(f"a threshold above {_LARGEST[precision]}, the largest {precision} holds")
    return thresholds
