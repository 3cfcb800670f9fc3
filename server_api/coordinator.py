"""What the server does: the pure round machine, the mean and the store brought together."""

import asyncio
import heapq
import logging
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import attrgetter
from pathlib import Path

import numpy as np
from starlette.concurrency import run_in_threadpool

from server_api import errors, rounds, views
from server_api.aggregation import Contribution, mean
from server_api.bundle_files import BundleFiles
from server_api.rounds import Run, Step
from server_api.store import Change, Journal, RunRecord, Store, Update
from server_api.summary import Report
from spafl.canonical import sha256_hex
from spafl.errors import WireError
from spafl.layout import ThresholdLayout
from spafl.manifest import Manifest
from spafl.protocol import BundleView, Capabilities, Lease, Metrics, RoundView, RunSettings, RunView
from spafl.wire import Thresholds, decode_thresholds, encode_thresholds

log = logging.getLogger(__name__)

_LARGEST_F16 = float(np.finfo(np.float16).max)
_LONG_BODY = 256 * 1024
"""Bytes; checking a longer one takes milliseconds, in which nothing else would be answered: it gets a thread."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What never changes about a run."""

    settings: RunSettings
    layout: ThresholdLayout


class Coordinator:
    """The rounds of every run in a store. Any method may be called from any thread.

    What devices ask for most, `check_in` and `report`, are coroutines: a thread for each would cost more than what
    it does.

    clock   returns the time, seconds since the epoch
    """

    def __init__(self, store: Store, files: BundleFiles, clock: Callable[[], float]) -> None:
        self.store = store
        self.files = files
        self.clock = clock
        self._facts: dict[str, Facts] = {}
        # neither changes once it is there; a refusal is not remembered
        self.manifest = lru_cache(maxsize=64)(self._manifest)
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

    async def check_in(self, name: str, device: str, capabilities: Capabilities) -> tuple[Lease, bool]:
        """Returns the lease of `device` in the open round, and whether it is new.

        Raises:
            NotFound, RunOver, RunNotStarted, RunPaused, AlreadyReported, RoundFull: as `rounds.check_in` says.
        """
        facts, now = await self.facts_of(name), self.clock()
        act = partial(rounds.check_in, device=device, now=now)
        change = await asyncio.wrap_future(self._submit(facts, now, act, capabilities=capabilities))
        new = any(effect.kind == "lease.granted" for effect in change.step.effects)
        return views.lease(change.step.run, device, facts.layout.id), new

    async def report(self, name: str, number: int, device: str, body: bytes, metrics: Metrics) -> None:
        """Returns nothing once the update is counted and on disk; the same one again counts once.

        Raises:
            BadThresholds, BadMetrics: the update is not usable; nothing of it was kept.
            NotFound, RoundClosed, UpdateDiffers, LeaseExpired, NotLeased: as `rounds.report` says.
        """
        facts = await self.facts_of(name)
        layers = len(facts.layout.layers)
        if metrics.density and len(metrics.density) != layers:
            raise errors.BadMetrics(f"densities of {len(metrics.density)} layers, expected {layers} or none")
        if len(body) > _LONG_BODY:
            version, digest = await run_in_threadpool(_checked, facts, body, metrics)
        else:
            version, digest = _checked(facts, body, metrics)
        update, now = Update(number, device, Report(digest, metrics), body), self.clock()

        def act(run: Run) -> Step:
            return rounds.report(run, number, device, version, update.report, now)

        try:
            await asyncio.wrap_future(self._submit(facts, now, act, update=update))
        except errors.RoundClosed:
            # the answer to a counted update may have been lost: told again, the device can forget it
            counted = await run_in_threadpool(self.store.counted, name, number, device)
            if counted is None:
                raise
            if counted != digest:
                raise errors.UpdateDiffers(
                    f"another update of this device is counted in round {number}"
                ) from None

    def settle(self) -> None:
        """Returns nothing once everything is done that time alone asks of any run by now."""
        now = self.clock()
        due = [record.run.settings.name for record in self.store.runs(live=True) if record.run.due <= now]
        # all are submitted before any is waited for: a run at fault does not stop the others
        answers = [self._submit(self.facts(name), now, partial(rounds.settle, now=now)) for name in due]
        for answer in answers:
            answer.result()

    def facts(self, name: str) -> Facts:
        """Returns what never changes about a run.

        Raises:
            NotFound: there is no such run.
        """
        if name not in self._facts:
            settings = self.record(name).run.settings
            self._facts[name] = Facts(settings, self.manifest(settings.bundle).layout)
        return self._facts[name]

    async def facts_of(self, name: str) -> Facts:
        """Returns `facts`, asking the store in a thread the first time."""
        known = self._facts.get(name)
        return await run_in_threadpool(self.facts, name) if known is None else known

    def _change(self, name: str, now: float, act: Callable[[Run], Step]) -> Change:
        return self._submit(self.facts(name), now, act).result()

    def _submit(
        self,
        facts: Facts,
        now: float,
        act: Callable[[Run], Step],
        *,
        update: Update | None = None,
        capabilities: Capabilities | None = None,
    ) -> Future[Change]:
        def decide(run: Run, journal: Journal) -> Change:
            step = act(run)
            thresholds, kinds = None, {effect.kind: effect for effect in step.effects}
            if "round.aggregated" in kinds:
                updates = journal.updates(kinds["round.aggregated"].round or 0)
                if update is not None and "update.accepted" in kinds:
                    updates = heapq.merge(updates, [update], key=attrgetter("device"))
                thresholds = aggregated(facts, updates, run.version + 1)
            return Change(step, update, thresholds, capabilities)

        answer = self.store.submit(facts.settings.name, now, decide)
        answer.add_done_callback(_log)
        return answer

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


def aggregated(facts: Facts, updates: Iterable[Update], version: int) -> bytes:
    """Returns the body of global thresholds `version`: the mean of `updates`, which ascend by device id."""
    contributions = (
        Contribution(
            update.device,
            update.report.metrics.examples,
            decode_thresholds(facts.layout, update.body).values,
        )
        for update in updates
    )
    values = mean(contributions, facts.settings.weighting)
    return encode_thresholds(facts.layout, Thresholds(values, version), facts.settings.precision)


def replay(store: Store, facts: Facts) -> Iterator[tuple[int, bytes]]:
    """Yields each version above 0 of a run's thresholds with its body, computed again from the counted updates."""
    name, after = facts.settings.name, 0
    while page := store.rounds(name, after, 256):
        for round in page:
            if round.state == "aggregated":
                version = round.version + 1
                yield version, aggregated(facts, store.updates(name, round.round), version)
        after = page[-1].round


def _checked(facts: Facts, body: bytes, metrics: Metrics) -> tuple[int, str]:
    """Returns the version an update was trained from and the digest of the update, once it is found usable."""
    try:
        thresholds = decode_thresholds(facts.layout, body)
    except WireError as error:
        raise errors.BadThresholds(str(error)) from error
    # a mean that f16 cannot hold could not be sent, and the run could not go on
    if facts.settings.precision == "f16" and float(np.abs(thresholds.values).max()) > _LARGEST_F16:
        raise errors.BadThresholds(f"a threshold beyond {_LARGEST_F16:.0f}, the most this run's f16 can hold")
    return thresholds.version, sha256_hex(body + b"\0" + metrics.to_text().encode())


def _log(answer: Future[Change]) -> None:
    if answer.cancelled() or answer.exception() is not None:
        return
    step = answer.result().step
    for effect in step.effects:
        if effect.kind.startswith(("run.", "round.")):
            log.info("run %s: %s %s %s", step.run.settings.name, effect.kind, effect.round or "", effect.data)
