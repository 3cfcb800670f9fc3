"""The agent with the engine it ships with, on a bundle of the exporter."""

from pathlib import Path

import numpy as np
import pytest

from device_runtime.agent import Agent, Work
from device_runtime.client import Client
from device_runtime.engines import Engine, open_engine
from device_runtime.errors import Diverged, StateError, Stopped
from device_runtime.examples import Examples, LocalData
from device_runtime.journal import Identity
from device_runtime.local import RUN, adopt, train_locally
from device_runtime.state import DeviceState
from device_runtime.training import Tempo
from device_runtime.watch import Watch
from spafl.bundle import Bundle, write_bundle
from spafl.hyperparameters import Hyperparameters
from tests.device_runtime.conftest import Events
from tests.device_runtime.tiny import FileServer, make_lease

ROUNDS = 2
HYPERPARAMETERS = Hyperparameters(epochs=2, batch_size=8, lr=0.05, coeff=0.02)


@pytest.fixture
def data() -> LocalData:
    random = np.random.default_rng(1)
    y = random.integers(0, 3, 60)
    x = random.integers(0, 128, (60, 1, 8, 8), np.uint8)
    x[np.arange(60), 0, 2 * y] += 100  # the label is a bright row
    examples = Examples(x, y)
    return LocalData(examples.take(np.arange(41)), examples.take(np.arange(41, 60)))


def train(
    path: Path, bundle: Bundle, engine: Engine, data: LocalData, watch: Watch, report: Events
) -> dict[str, np.ndarray]:
    with DeviceState(path) as state:
        train_locally(
            state,
            bundle,
            engine,
            data,
            ROUNDS,
            HYPERPARAMETERS,
            seed=3,
            watch=watch,
            report=report,
            tempo=Tempo(3600),
        )
        assert state.journal.run == RUN
        return state.rest(bundle)[0]


def test_training_alone_learns_and_keeps_its_own_thresholds(
    small_bundle: Bundle, data: LocalData, tmp_path: Path
) -> None:
    report = Events()
    with Watch(report) as watch:
        tensors = train(tmp_path, small_bundle, open_engine("onnx", small_bundle), data, watch, report)
    losses = [float(str(fields["loss"])) for fields in report.of("epoch")]
    assert losses[-1] < 0.7 * losses[0]
    thresholds = small_bundle.manifest.layout.join(tensors)
    # the regulariser alone raises a threshold by lr * coeff * sum_k (1 - 0.9**k) / 0.1 = 0.041 in a round's ten steps;
    # were they replaced between the rounds, as a run's are, they could not be higher
    assert thresholds.max() > 0.06


def test_a_round_stopped_at_any_step_ends_with_the_same_bytes(
    small_bundle: Bundle, data: LocalData, tmp_path: Path
) -> None:
    with Watch(Events()) as watch:
        straight = train(
            tmp_path / "straight", small_bundle, open_engine("onnx", small_bundle), data, watch, Events()
        )
    stops = 0
    while True:
        engine = open_engine("onnx", small_bundle)
        with Watch(Events()) as watch:
            stop_after(engine, 4, watch)
            try:
                stopped = train(tmp_path / "stopped", small_bundle, engine, data, watch, Events())
            except Stopped:
                stops += 1
                continue
        break
    assert stops >= 4
    assert set(stopped) == set(straight)
    for name in straight:
        assert stopped[name].tobytes() == straight[name].tobytes(), name


def stop_after(engine: Engine, steps: int, watch: Watch) -> None:
    step = engine.step
    taken = 0

    def counted(*args: object) -> object:
        nonlocal taken
        taken += 1
        if taken == steps:
            watch.stop()
        return step(*args)  # type: ignore[arg-type]

    engine.step = counted  # type: ignore[method-assign, assignment]


def test_diverged_training_alone_starts_the_round_anew(
    small_bundle: Bundle, data: LocalData, tmp_path: Path
) -> None:
    floats = Examples(data.train.inputs(small_bundle.manifest.input) * np.float32(1e30), data.train.y)
    wild = LocalData(floats, data.validation)
    with Watch(Events()) as watch:
        with pytest.raises(Diverged, match="lower the run's lr"):
            train(tmp_path, small_bundle, open_engine("onnx", small_bundle), wild, watch, Events())
        with DeviceState(tmp_path) as state:
            assert (state.journal.phase, state.journal.diverged, state.journal.trained) == ("idle", 1, 0)
        tensors = train(tmp_path, small_bundle, open_engine("onnx", small_bundle), data, watch, Events())
    assert all(np.isfinite(tensor).all() for tensor in tensors.values())


def test_a_state_of_a_run_is_not_trained_alone(small_bundle: Bundle, data: LocalData, tmp_path: Path) -> None:
    lease = make_lease(small_bundle)
    with DeviceState(tmp_path) as state:
        state.leased(lease)
    with Watch(Events()) as watch, pytest.raises(StateError, match="holds the model of run 'r'"):
        train(tmp_path, small_bundle, open_engine("onnx", small_bundle), data, watch, Events())


def test_a_bundle_is_adopted_once_and_no_other_after_it(
    small_bundle: Bundle, bundle: Bundle, tmp_path: Path
) -> None:
    with DeviceState(tmp_path / "state") as state:
        assert adopt(state, small_bundle).id == small_bundle.id
        assert adopt(state, small_bundle).path == state.bundle_path
        with pytest.raises(StateError, match="give another --state"):
            adopt(state, bundle)


def test_a_run_over_http_with_the_engine_it_ships_with(
    small_bundle: Bundle, data: LocalData, tmp_path: Path, identity: Identity
) -> None:
    unpacked = write_bundle(
        tmp_path / "unpacked",
        small_bundle.manifest,
        {name: small_bundle.read(name) for name in small_bundle.manifest.files},
    )
    server = FileServer(tmp_path / "server.json", unpacked, rounds=3)
    report = Events()
    with DeviceState(tmp_path / "state") as state, Watch(report) as watch:
        state.enrolled(identity)
        client = Client("http://server", identity.token, transport=server.transport)
        Agent(
            client,
            state,
            Work("r"),
            load=lambda manifest: data,
            open_engine=lambda held: open_engine("onnx", held),
            watch=watch,
            report=report,
        ).work()
        assert (state.journal.trained, state.journal.updates) == (3, 3)
        thresholds = small_bundle.manifest.layout.join(state.rest(unpacked)[0])
    assert np.array_equal(np.array(server.load()["versions"][3], np.float32), thresholds)
