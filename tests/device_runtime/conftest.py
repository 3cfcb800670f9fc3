from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from device_runtime.agent import Agent, Work
from device_runtime.client import Client
from device_runtime.conditions import Reading
from device_runtime.journal import Identity
from device_runtime.state import DeviceState
from device_runtime.training import Tempo
from device_runtime.watch import Watch
from spafl.bundle import Bundle
from spafl.secret import Secret
from tests.device_runtime.tiny import TOKEN, FileServer, NumpyEngine, tiny_bundle, tiny_data


class Events(list[tuple[str, dict[str, object]]]):
    """A report that remembers."""

    def event(self, name: str, **fields: object) -> None:
        self.append((name, fields))

    def step(self, title: str, done: int, total: int, loss: float) -> None:
        pass

    def names(self) -> list[str]:
        return [name for name, _ in self]

    def of(self, name: str) -> list[dict[str, object]]:
        return [fields for told, fields in self if told == name]


@pytest.fixture
def events() -> Events:
    return Events()


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return tiny_bundle(tmp_path / "exported")


@pytest.fixture
def identity() -> Identity:
    return Identity(server="http://server", device="d1", token=Secret(TOKEN))


@pytest.fixture
def state(tmp_path: Path, identity: Identity) -> Iterator[DeviceState]:
    with DeviceState(tmp_path / "state") as opened:
        opened.enrolled(identity)
        yield opened


@pytest.fixture
def reading() -> dict[str, object]:
    """What the device of a test reads; change it while the test runs."""
    return {}


@pytest.fixture
def watch(events: Events, reading: dict[str, object]) -> Iterator[Watch]:
    with Watch(events, read=lambda: Reading(**reading), interval=0.0) as opened:
        yield opened


@pytest.fixture
def server(tmp_path: Path, bundle: Bundle) -> FileServer:
    return FileServer(tmp_path / "server.json", bundle, rounds=3)


@pytest.fixture
def agent(server: FileServer, state: DeviceState, watch: Watch, events: Events) -> Callable[..., Agent]:
    """Makes an agent of the test's device; each call is a new process as far as the agent can tell."""

    def make(engine: type[NumpyEngine] = NumpyEngine, steps: int | None = None, **work: int) -> Agent:
        state.close()
        state.__init__(state.path)  # type: ignore[misc]  # what a restart reads
        wait = lambda seconds: watch.sleep(min(seconds, 0.001))  # noqa: E731
        client = Client("http://server", Secret(TOKEN), transport=server.transport, wait=wait)
        return Agent(
            client,
            state,
            Work("r", tempo=Tempo(3600.0, steps), poll=0.001, **work),
            load=lambda manifest: tiny_data(),
            open_engine=engine,
            watch=watch,
            report=events,
        )

    return make
