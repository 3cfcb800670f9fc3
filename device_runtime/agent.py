"""A device's part in a run: check in, catch up, train, report, sleep; for as long as the run lasts.

    idle -> leased -> training -> trained -> idle

The journal holds the phase, and each pass of the loop does what the phase asks for: after kill -9 the loop simply goes
on. What a kill costs: in `leased` nothing was trained yet, and checking in again gives the same lease; in `training`
the steps since the last checkpoint are done again, as the same steps; in `trained` the same bytes are sent again, which
the server counts once. An update that comes too late is not counted, but its training stays in the weights.
"""

import platform
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from device_runtime.client import Client
from device_runtime.download import fetch_bundle
from device_runtime.engines import Engine
from device_runtime.errors import (
    BadAnswer,
    Busy,
    Diverged,
    Refused,
    RunOver,
    StateError,
    Unreachable,
)
from device_runtime.examples import LocalData
from device_runtime.report import Report
from device_runtime.retry import Backoff
from device_runtime.state import DeviceState
from device_runtime.training import LocalRound, Tempo, update_body
from device_runtime.watch import Watch
from spafl import __version__
from spafl.bundle import Bundle
from spafl.manifest import Manifest
from spafl.protocol import Capabilities, LeaseRequest, RunSettings

OFFLINE = Backoff(first=2.0, cap=300.0)
"""Between attempts without a server, after the client's own retries."""


@dataclass(frozen=True, slots=True)
class Work:
    """What an agent is to do.

    run       the run to take part in
    engine    the name told to the server
    rounds    stop after so many updates that the server counted; None: until the run is over
    seed      of the order of the batches
    poll      seconds until the next check-in where the server names none
    """

    run: str
    engine: str = "onnx"
    rounds: int | None = None
    seed: int = 0
    poll: float = 5.0
    tempo: Tempo = field(default_factory=Tempo)


def capabilities(engine: str) -> Capabilities:
    """Returns what this device says about itself: its engine, operating system and processor, and our version."""
    return Capabilities(
        engine=engine, platform=f"{platform.system()} {platform.machine()}".lower(), version=__version__
    )


class Agent:
    """One device at work in one run.

    client        with the device's token, and `watch.sleep` to wait with
    state         open for writing
    load          gives the local examples, once the model they are for is known
    open_engine   opens an engine on the run's bundle
    """

    def __init__(
        self,
        client: Client,
        state: DeviceState,
        work: Work,
        *,
        load: Callable[[Manifest], LocalData],
        open_engine: Callable[[Bundle], Engine],
        watch: Watch,
        report: Report,
    ) -> None:
        if state.identity is None:
            raise StateError(f"{state.path} is not enrolled: run `spafl device enrol` first")
        self._device = state.identity.device
        self._client = client
        self._state = state
        self._work = work
        self._load = load
        self._open_engine = open_engine
        self._watch = watch
        self._report = report
        self._settings: RunSettings | None = None
        self._opened: Bundle | None = None
        self._tools: tuple[Engine, LocalData] | None = None

    def work(self) -> int:
        """Returns the number of updates the server counted, once they are enough or the run is over.

        Raises:
            Stopped: a signal came; the state is saved.
            DeviceError: a person has to do something: other data, another token, another state directory.
        """
        updates = failures = 0
        while self._work.rounds is None or updates < self._work.rounds:
            try:
                updates += self._proceed()
                failures = 0
            except RunOver:
                break
            except Busy as error:
                self._sleep(str(error), error.retry_after or self._work.poll)
            except (Unreachable, BadAnswer) as error:
                self._sleep(str(error), OFFLINE.delay(failures, random.random(), error.retry_after))
                failures += 1
        self._report.event("finished", run=self._work.run, updates=updates)
        return updates

    def _proceed(self) -> int:
        phase = self._state.journal.phase if self._state.begun else "idle"
        if phase == "trained":
            return self._send()
        try:
            if phase == "training":
                local_round = self._local_round(self._bundle(self._state.journal.bundle))
                local_round.resume()
            else:
                local_round = self._check_in()
            local_round.run()
        except Diverged as error:
            self._report.event("round.diverged", round=self._state.lease.round, reason=str(error))
            self._state.diverged()
        return 0

    def _check_in(self) -> LocalRound:
        run, state = self._work.run, self._state
        if self._settings is None:
            self._settings = self._client.run(run).settings
        # all that may take long or fail comes before the lease: a device that cannot train must not keep a slot
        state.check_owner(run, self._settings.bundle)
        bundle = self._bundle(self._settings.bundle)
        self._prepare(bundle)
        self._watch.hold(self._settings.policy)
        version = state.journal.version if state.begun else None
        lease = self._client.lease(
            run, LeaseRequest(version=version, capabilities=capabilities(self._work.engine))
        )
        if state.begun and state.journal.skip == lease.round:
            raise Busy(f"training diverged in round {lease.round}: waiting for the next one")
        state.leased(lease)
        self._report.event("round.leased", round=lease.round, version=lease.version, expires=lease.expires)
        tensors, base = state.rest(bundle)
        target = base
        if lease.version != state.journal.version:
            target = self._client.thresholds(run, lease.version, bundle.manifest.layout).values
        local_round = self._local_round(bundle)
        local_round.begin(tensors, base, target, self._work.seed)
        return local_round

    def _send(self) -> int:
        lease, metrics = self._state.lease, self._state.journal.metrics
        bundle = self._bundle(lease.bundle)
        tensors, _ = self._state.rest(bundle)
        body = update_body(bundle.manifest, tensors, lease.version, lease.precision)
        try:
            self._client.report(lease.run, lease.round, self._device, body, metrics or "")
        except (Refused, RunOver) as error:
            self._state.settled("late")
            self._report.event("update.late", round=lease.round, reason=str(error))
            return 0
        self._state.settled("updates")
        self._report.event("update.accepted", round=lease.round, bytes=len(body))
        return 1

    def _bundle(self, id: str) -> Bundle:
        if self._opened is None:
            self._opened = fetch_bundle(self._client, id, self._state.bundle_path)
            self._report.event("bundle.ready", bundle=id, model=self._opened.manifest.name)
        return self._opened

    def _prepare(self, bundle: Bundle) -> tuple[Engine, LocalData]:
        if self._tools is None:  # once: sessions and examples serve every round
            self._tools = self._open_engine(bundle), self._load(bundle.manifest)
        return self._tools

    def _local_round(self, bundle: Bundle) -> LocalRound:
        engine, data = self._prepare(bundle)
        return LocalRound(
            engine, self._state, data, watch=self._watch, report=self._report, tempo=self._work.tempo
        )

    def _sleep(self, reason: str, seconds: float) -> None:
        self._report.event("waiting", reason=reason, seconds=round(seconds, 1))
        self._watch.sleep(seconds)
