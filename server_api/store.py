"""What the server remembers, behind one interface."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias

from server_api.rounds import Run, Step
from server_api.summary import Report
from spafl.protocol import BundleView, Capabilities, DeviceView, Event, RoundView, RunSettings

Role: TypeAlias = Literal["admin", "device", "enrolment"]


@dataclass(frozen=True, slots=True)
class Principal:
    """Who holds a token: a role, and the device's id if it is a device's."""

    role: Role
    device: str = ""


@dataclass(frozen=True, slots=True)
class Update:
    """A counted update with the bytes it came as."""

    round: int
    device: str
    report: Report
    body: bytes


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run as stored: its machine's state, and what never changes.

    layout     of its thresholds
    created    seconds since the epoch
    revision   id of its last event
    """

    run: Run
    layout: str
    created: float
    revision: int


@dataclass(frozen=True, slots=True)
class Change:
    """What one event does to a run: the machine's step, and the bytes that belong to it.

    update         with effect update.accepted
    thresholds     the body of the new version, with effect round.aggregated
    capabilities   what a device said, with effect lease.granted
    """

    step: Step
    update: Update | None = None
    thresholds: bytes | None = None
    capabilities: Capabilities | None = None


class Journal(Protocol):
    """The counted updates of a run, as seen inside a change."""

    def updates(self, round: int) -> Iterator[Update]:
        """Yields the counted updates of a round by ascending device id (by code point)."""
        ...


Decision: TypeAlias = Callable[[Run, Journal], Change]


class Store(ABC):
    """Everything the server must not forget.

    Threads     Any method may be called from any thread, and by several processes where the backend allows it.
    Durability  What a method wrote is on disk when it returns; a process killed in between leaves all or nothing.
    Ownership   Returned values are the caller's; none changes behind its back. Iterators hold a connection until
                they end or are closed.
    For ever    Bundles, thresholds, counted updates, events and closed rounds never change once written.
    Order       Changes of one run happen one after the other; event ids of a run grow by one from 1.
    Failure     `StoreBusy` if the backend could not be reached or written in time; nothing was kept then.
    """

    @abstractmethod
    def close(self) -> None:
        """Returns nothing; connections are closed, and the store must not be used again."""

    @abstractmethod
    def ping(self) -> None:
        """Returns nothing if the store answers.

        Raises:
            StoreBusy: it does not.
        """

    @abstractmethod
    def has_token(self, role: Role) -> bool:
        """Returns whether any token of `role` was ever set."""

    @abstractmethod
    def replace_tokens(self, role: Role, digest: str) -> None:
        """Returns nothing; from now on the token of SHA-256 `digest` is the only one of `role`."""

    @abstractmethod
    def principal(self, digest: str) -> Principal | None:
        """Returns whom the token of SHA-256 `digest` belongs to, None if it is unknown."""

    @abstractmethod
    def add_device(
        self, device: str, name: str | None, capabilities: Capabilities, digest: str, now: float
    ) -> None:
        """Returns nothing; `device`, a fresh id, is enrolled with the token of SHA-256 `digest`."""

    @abstractmethod
    def devices(self, after: str, limit: int) -> list[DeviceView]:
        """Returns up to `limit` devices with ids above `after`, by id."""

    @abstractmethod
    def add_bundle(self, bundle: BundleView, manifest: bytes) -> bool:
        """Returns whether the bundle is new; one that is already there stays as it is."""

    @abstractmethod
    def bundle(self, id: str) -> BundleView | None:
        """Returns a bundle, None if there is none."""

    @abstractmethod
    def manifest(self, id: str) -> bytes | None:
        """Returns a bundle's manifest.json, None if there is no such bundle."""

    @abstractmethod
    def bundles(self) -> list[BundleView]:
        """Returns every bundle, the newest first."""

    @abstractmethod
    def add_run(self, settings: RunSettings, layout: str, thresholds: bytes, now: float) -> bool:
        """Returns whether the run is new, its event run.created written and `thresholds` stored as version 0.

        A run of that name which is already there stays as it is.
        """

    @abstractmethod
    def run(self, name: str) -> RunRecord | None:
        """Returns a run, None if there is none of that name."""

    @abstractmethod
    def runs(self, *, live: bool = False) -> list[RunRecord]:
        """Returns every run, the newest first; with `live` only those that are neither finished nor stopped."""

    @abstractmethod
    def submit(self, name: str, now: float, decide: Decision) -> Future[Change]:
        """Returns at once; its result is what `decide` made of the run's state, once everything of it is stored.

        decide is called with the run's current state and its journal while nothing else changes the run; whatever
        it raises is the result's exception and changes nothing. It must not call the store, and may be called again
        if what it decided first could not be written. It sees the submissions before it done.

        The result may raise:
            NotFound: there is no run `name`.
        """

    def change(self, name: str, now: float, decide: Decision) -> Change:
        """Returns the result of `submit`, waiting for it."""
        return self.submit(name, now, decide).result()

    @abstractmethod
    def rounds(self, name: str, after: int, limit: int) -> list[RoundView]:
        """Returns up to `limit` closed rounds with numbers above `after`, by number."""

    @abstractmethod
    def thresholds(self, name: str, version: int) -> bytes | None:
        """Returns the body of a version of the run's global thresholds, None if there is none."""

    @abstractmethod
    def counted(self, name: str, round: int, device: str) -> str | None:
        """Returns the digest of the update of `device` counted in a round, open or closed; None if none is."""

    @abstractmethod
    def updates(self, name: str, round: int) -> Iterator[Update]:
        """Yields the counted updates of a round by ascending device id (by code point)."""

    @abstractmethod
    def events(self, name: str, after: int, limit: int) -> list[Event]:
        """Returns up to `limit` events of a run with ids above `after`, by id."""
