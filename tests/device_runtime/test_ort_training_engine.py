"""The engine on ONNX Runtime Training: its frames and messages anywhere, its steps where the runtime is installed."""

import copy
import gc
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from numpy.typing import NDArray

from device_runtime.engines import (
    EngineError,
    open_engine,
    ort_training,
    ort_training_environment,
    ort_training_worker,
    require_engine,
)
from device_runtime.engines.ort_training import OrtTrainingEngine
from device_runtime.engines.ort_training_worker import FRAME, MAX_BODY, MAX_HEADER, read_frame, write_frame
from device_runtime.examples import Examples, LocalData
from device_runtime.local import train_locally
from device_runtime.state import DeviceState
from device_runtime.training import Tempo
from device_runtime.watch import Watch
from export.host import Arrays
from export.parity import BATCHES, DRAWS, STEP, check_step
from spafl import algorithm
from spafl.bundle import INITIAL_STATE, Bundle, write_bundle
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats
from spafl.manifest import InputSpec, Manifest, TrainStep
from spafl.ort_training import RELEASE, VARIABLE, python_of
from spafl.step import ACTIVE, MOMENTUM
from tests.device_runtime.conftest import Events
from tests.device_runtime.small_model import small_model
from tests.export.artifacts import artifacts, needs_ort_training, tensors_of
from trainer.local import zero_momenta
from trainer.models import LeNet5
from trainer.sparsify import layout_of, sparsify

BARE = Hyperparameters(lr=0.01, coeff=0.0, momentum=0.0)
"""What is left of a threshold's momentum is the task's gradient."""
TIGHT = Hyperparameters(lr=0.02, threshold_lr=0.01, coeff=0.01, clip=0.05)
"""Clips every step: no gradient of these models is that small."""
FLOAT32 = 2e-5
"""Between engines, relative to a tensor's largest value: some hundred roundings over the steps of a test."""
LEAST = 1e-3
"""Or to this: a momentum far below it, as of a bias before a batch norm, is nothing but rounding itself."""
SECONDS = 10.0
"""For a process to end that has nothing left to do."""


@pytest.fixture(scope="module")
def bundle(small_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small bundle, for both engines."""
    model = sparsify(small_model())
    model.shape = (1, 8, 8)  # type: ignore[assignment]
    files, entry = artifacts(model)
    manifest = small_bundle.manifest
    both = replace(manifest, engines={**manifest.engines, "ort_training": entry})
    held = {name: small_bundle.read(name) for name in manifest.files}
    return write_bundle(tmp_path_factory.mktemp("ort") / "b", both, held | files)


@pytest.fixture(scope="module")
def lenet(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """LeNet-5 for this engine alone: tracing the other's graphs takes a minute."""
    model = lenet_model()
    files, entry = artifacts(model)
    tensors = tensors_of(model)
    manifest = Manifest(
        name="lenet5",
        layout=layout_of(model),
        state=tensors,
        input=InputSpec(shape=(1, 28, 28), mean=(0.0,), std=(1.0,)),
        labels=tuple("0123456789"),
        train_step=TrainStep(form="dense", reason="test"),
        compaction=(),
        engines={"ort_training": entry},
        files={name: {"bytes": 0, "sha256": "0" * 64} for name in files},
        producer={},
    )
    state = {tensor.name: model.state_dict()[tensor.name].numpy() for tensor in tensors}
    out = tmp_path_factory.mktemp("lenet") / "b"
    return write_bundle(out, manifest, {**files, INITIAL_STATE: safetensors.numpy.save(state)})


def lenet_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return sparsify(LeNet5())


def opened(bundle: Bundle) -> OrtTrainingEngine:
    engine = open_engine("ort_training", bundle)
    assert isinstance(engine, OrtTrainingEngine)
    return engine


def batches(bundle: Bundle, sizes: tuple[int, ...]) -> list[tuple[Floats, NDArray[np.int64]]]:
    draw = np.random.default_rng(6)
    manifest = bundle.manifest
    return [
        (
            draw.normal(size=(size, *manifest.input.shape)).astype(np.float32),
            draw.integers(0, len(manifest.labels), size),
        )
        for size in sizes
    ]


def half(bundle: Bundle) -> Floats:
    """Thresholds at which half of every layer's filters are active."""
    return algorithm.thresholds_at(
        bundle.manifest.layout, bundle.initial_state(), 0.5, np.random.default_rng(7)
    )


def assert_close(got: Mapping[str, Floats], expected: Mapping[str, Floats]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(np.abs(value).max()), LEAST)
        np.testing.assert_allclose(got[name], value, rtol=0, atol=FLOAT32 * scale, err_msg=name)


class EngineHost:
    """An engine as the parity checks drive it: whole state in and out at every step."""

    def __init__(self, engine: OrtTrainingEngine, active: Arrays) -> None:
        self._engine, self._active = engine, active
        self.state: Arrays = {}
        self.momenta: Arrays = {}
        self.rows: Arrays = {}
        self.active: Arrays = {}

    def synchronise(self, state: Mapping[str, Floats], momenta: Mapping[str, Floats]) -> None:
        self.state, self.momenta = dict(state), dict(momenta)

    def step(self, x: Floats, y: NDArray[np.int64], h: Hyperparameters) -> tuple[float, int]:
        moving = {MOMENTUM + name: value for name, value in self.momenta.items()}
        self._engine.resume({**self.state, **moving, **self._active})
        result = self._engine.step(x, y, h)
        after = self._engine.checkpoint()
        self.state = {name: after[name] for name in self.state}
        self.momenta = {name: after[MOMENTUM + name] for name in self.momenta}
        return result.loss, result.correct


# Frames


def test_what_is_written_is_read() -> None:
    stream = io.BytesIO()
    x, y = np.arange(6, dtype=np.float32).reshape(2, 3), np.array([7, 8])
    write_frame(stream, {"do": "step", "shape": x.shape}, x, y, b"")
    write_frame(stream, {})
    stream.seek(0)
    header, body = read_frame(stream)
    assert header == {"do": "step", "shape": [2, 3]}
    assert bytes(body) == x.tobytes() + y.tobytes()
    assert read_frame(stream) == ({}, bytearray())
    with pytest.raises(EOFError):
        read_frame(stream)


@pytest.mark.parametrize(
    ("frame", "error"),
    [
        (FRAME.pack(MAX_HEADER + 1, 0), "are allowed"),
        (FRAME.pack(2, MAX_BODY + 1), "are allowed"),
        (FRAME.pack(2, 0) + b"[]", "without a JSON object"),
        (FRAME.pack(2, 0) + b"{:", "Expecting property name"),
    ],
)
def test_what_is_no_frame_is_refused_before_it_is_read(frame: bytes, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read_frame(io.BytesIO(frame))


@pytest.mark.parametrize("left", [3, 13, 20])
def test_a_frame_that_breaks_off_is_the_end(left: int) -> None:
    stream = io.BytesIO()
    write_frame(stream, {"do": "load"}, b"12345678")
    with pytest.raises(EOFError):
        read_frame(io.BytesIO(stream.getvalue()[:left]))


def test_too_much_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_training_worker, "MAX_BODY", 7)
    stream = io.BytesIO()
    with pytest.raises(ValueError, match=r"19 \+ 8 bytes"):
        write_frame(stream, {"do": "something"}, b"12345678")
    assert not stream.getvalue()


# The process, without the runtime


def worker(parent: int, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", str(ort_training._SCRIPT), str(parent)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)


def test_a_failed_request_is_answered_in_words_and_signals_to_the_group_are_ignored() -> None:
    with worker(os.getpid()) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in (None, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number is not None:
                process.send_signal(number)
            write_frame(process.stdin, {"do": "dance"})
            assert read_frame(process.stdout)[0] == {"error": "KeyError: 'dance'"}
        process.stdin.close()
        assert process.wait(SECONDS) == 0


def test_what_the_runtime_prints_does_not_come_between_frames() -> None:
    loud = """
import importlib.util, os, sys
spec = importlib.util.spec_from_file_location("worker", sys.argv[1])
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)
worker.Worker.load = lambda self, header, body: ({"wrote": os.write(1, b"noise")}, b"")
sys.argv = [sys.argv[1], str(os.getppid())]
worker.main()
"""
    command = [sys.executable, "-c", loud, str(ort_training._SCRIPT)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        write_frame(process.stdin, {"do": "load"})
        assert read_frame(process.stdout)[0] == {"wrote": 5}
        assert process.communicate(timeout=SECONDS) == (b"", b"noise")


def test_the_worker_ends_with_its_parent_though_its_streams_stay_open() -> None:
    starter = """
import subprocess, sys, time, os
worker = subprocess.Popen([sys.executable, "-I", sys.argv[1], str(os.getpid())], stdin=0, stdout=1)
time.sleep(0.5)
os.kill(os.getpid(), 9)
"""
    requests, ours = os.pipe()
    with os.fdopen(ours, "wb"), os.fdopen(requests, "rb") as theirs:
        started = subprocess.Popen(
            [sys.executable, "-c", starter, str(ort_training._SCRIPT)], stdin=theirs, stdout=subprocess.PIPE
        )
        assert started.wait(SECONDS) == -signal.SIGKILL
        # its end: the worker, who holds it too, is gone
        assert started.communicate(timeout=SECONDS) == (b"", None)


def test_a_missing_runtime_is_one_line_before_any_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        EngineError, match=r"run `spafl device install-ort-training` \(`make engines`"
    ) as told:
        require_engine("ort_training")
    assert "\n" not in str(told.value)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "python"))
    with pytest.raises(EngineError, match=f"python is no file: unset {VARIABLE} and run"):
        require_engine("ort_training")


def fake_python(folder: Path, script: str) -> Path:
    python = python_of(folder)
    python.parent.mkdir(parents=True)
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return python


def test_an_installed_runtime_is_not_installed_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ort_training_environment, "_run", lambda command: pytest.fail(f"ran {command}"))
    python = fake_python(tmp_path / "there", f"echo {RELEASE}")
    assert ort_training_environment.install(tmp_path / "there") == python
    with pytest.raises(pytest.fail.Exception, match="venv"):
        ort_training_environment.install(tmp_path / "elsewhere")


def test_what_keeps_it_from_being_installed_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot install ONNX Runtime Training: .*/no/python"):
        ort_training_environment.install(tmp_path / "e", Path("/no/python"))
    broken = fake_python(tmp_path / "broken", "echo one >&2; echo ERROR: no such thing >&2; exit 1")
    with pytest.raises(EngineError, match=r"cannot install ONNX Runtime Training: ERROR: no such thing$"):
        ort_training_environment.install(tmp_path / "e", broken)
    monkeypatch.setattr(ort_training_environment, "LAST_PYTHON", (3, 9))
    with pytest.raises(EngineError, match=r"has no wheels for Python 3\.\d+: .* --python with one of 3\.9"):
        ort_training_environment.install(tmp_path / "e")


def test_a_process_that_ends_at_once_is_an_error_with_its_words(
    small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = fake_python(tmp_path, "echo something is amiss >&2; exit 3")
    monkeypatch.setattr(ort_training, "require_python", lambda: python)
    entry = {"ort_training": replace(small_bundle.manifest.engines["onnx"], files={})}
    bundle = Bundle(small_bundle.path, replace(small_bundle.manifest, engines=entry))
    engine = OrtTrainingEngine(bundle)
    with pytest.raises(EngineError, match=r"ended with 3; it said: something is amiss\): start again"):
        engine.begin_round(bundle.initial_state(), half(bundle), half(bundle))


# Training


@needs_ort_training
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("name", ["small", "lenet5"])
def test_ten_steps_are_eager_pytorchs(name: str, density: float, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue("bundle" if name == "small" else "lenet")
    model = sparsify(small_model()) if name == "small" else lenet_model()
    layout, draw = bundle.manifest.layout, np.random.default_rng(8)
    manifest = replace(
        bundle.manifest, state=tuple(replace(tensor, rows=False) for tensor in bundle.manifest.state)
    )
    engine = opened(bundle)
    target = algorithm.thresholds_at(layout, bundle.initial_state(), density, draw)
    engine.begin_round(bundle.initial_state(), target, target)
    begun = engine.checkpoint()
    model.load_state_dict(
        {tensor.name: torch.from_numpy(begun[tensor.name]) for tensor in manifest.state}, strict=False
    )
    momenta = zero_momenta(model)
    host = EngineHost(engine, {key: value for key, value in begun.items() if key.startswith(ACTIVE)})
    for size, h in zip(BATCHES, (STEP, BARE, TIGHT, STEP, TIGHT) * 2, strict=True):
        for _ in range(DRAWS):
            moved = copy.deepcopy((model, momenta))
            batch = (
                draw.normal(size=(size, *manifest.input.shape)).astype(np.float32),
                draw.integers(0, len(manifest.labels), size),
            )
            check = check_step(*moved, host, manifest, density, batch, h)
            if check.difference <= check.tolerance:
                break
        assert check.difference <= check.tolerance, (size, h, check)
        model, momenta = moved


@needs_ort_training
def test_a_round_may_change_engines_at_any_step(bundle: Bundle) -> None:
    target = half(bundle)
    onnx, ort = open_engine("onnx", bundle), opened(bundle)
    straight = open_engine("onnx", bundle)
    starts = [
        engine.begin_round(bundle.initial_state(), target - np.float32(0.01), target)
        for engine in (onnx, straight)
    ]
    assert starts[0] == ort.begin_round(bundle.initial_state(), target - np.float32(0.01), target)
    steps = batches(bundle, (8, 8, 5, 8, 3, 8))
    taken = []
    for number, (x, y) in enumerate(steps):
        engine = onnx if number < 2 or number > 3 else ort
        if number == 2:
            ort.resume(onnx.checkpoint())
        if number == 4:
            onnx.resume(ort.checkpoint())
        taken.append((engine.step(x, y, TIGHT), straight.step(x, y, TIGHT)))
    for got, expected in taken:
        assert got.loss == pytest.approx(expected.loss, rel=FLOAT32)
        assert got.correct == expected.correct
    assert_close(onnx.checkpoint(), straight.checkpoint())
    assert_close(onnx.end_round(), straight.end_round())


@needs_ort_training
def test_predictions_are_the_compact_models_and_disturb_no_round(bundle: Bundle) -> None:
    engine, target = opened(bundle), half(bundle)
    engine.begin_round(bundle.initial_state(), target, target)
    x, y = batches(bundle, (300,))[0]  # more than one batch of predictions
    engine.step(x[:8], y[:8], STEP)
    before = engine.checkpoint()
    other = {**bundle.initial_state(), **bundle.manifest.layout.split(target)}
    logits = engine.predict(other, x)
    expected = open_engine("onnx", bundle).predict(other, x)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=FLOAT32 * np.abs(expected).max())
    for name, value in engine.checkpoint().items():
        assert value.tobytes() == before[name].tobytes(), name


@needs_ort_training
def test_a_dead_process_is_an_error_and_a_checkpoint_brings_the_round_back(bundle: Bundle) -> None:
    engine, straight, target = opened(bundle), opened(bundle), half(bundle)
    for each in (engine, straight):
        each.begin_round(bundle.initial_state(), target, target)
    (first, second) = batches(bundle, (8, 8))
    for each in (engine, straight):
        each.step(*first, STEP)
    saved = engine.checkpoint()
    kill(engine)
    with pytest.raises(EngineError, match=r"is gone \(killed by SIGKILL\): start again, the device goes on"):
        engine.step(*second, STEP)
    with pytest.raises(EngineError, match="the steps since the last checkpoint"):
        engine.checkpoint()
    engine.resume(saved)
    for each in (engine, straight):
        each.step(*second, STEP)
    again, expected = engine.end_round(), straight.end_round()
    for name, value in expected.items():
        assert again[name].tobytes() == value.tobytes(), name


@needs_ort_training
def test_a_device_whose_worker_died_goes_on_from_its_checkpoint(bundle: Bundle, tmp_path: Path) -> None:
    draw = np.random.default_rng(9)
    examples = Examples(draw.integers(0, 256, (20, 1, 8, 8), np.uint8), draw.integers(0, 3, 20))
    data = LocalData(examples, examples.take(np.arange(4)))

    def train(folder: str, engine: OrtTrainingEngine) -> dict[str, Floats]:
        with DeviceState(tmp_path / folder) as state, Watch(Events()) as watch:
            train_locally(
                state,
                bundle,
                engine,
                data,
                1,
                Hyperparameters(epochs=2, batch_size=5, lr=0.02, coeff=0.01),
                seed=1,
                watch=watch,
                report=Events(),
                tempo=Tempo(3600.0, 1),
            )
            return state.rest(bundle)[0]

    engine = opened(bundle)
    step, steps = engine._step, 0

    def fatal(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 4:
            kill(engine)
        return step(*args)

    engine._step = fatal  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="is gone"):
        train("killed", engine)
    killed, straight = train("killed", opened(bundle)), train("straight", opened(bundle))
    for name, value in straight.items():
        assert killed[name].tobytes() == value.tobytes(), name


@needs_ort_training
def test_signals_that_reach_the_whole_group_leave_the_worker_to_its_parent(bundle: Bundle) -> None:
    engine, target = opened(bundle), half(bundle)
    engine.begin_round(bundle.initial_state(), target, target)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(process_of(engine).pid, number)
    x, y = batches(bundle, (8,))[0]
    assert np.isfinite(engine.step(x, y, STEP).loss)


@needs_ort_training
def test_a_forgotten_engine_leaves_no_process(bundle: Bundle) -> None:
    engine, target = opened(bundle), half(bundle)
    engine.begin_round(bundle.initial_state(), target, target)
    pid = process_of(engine).pid
    del engine
    gc.collect()
    deadline = time.monotonic() + SECONDS
    while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{pid}").exists()


@needs_ort_training
def test_what_the_runtime_refuses_is_said_in_its_words(bundle: Bundle) -> None:
    engine, target = opened(bundle), half(bundle)
    engine.begin_round(bundle.initial_state(), target, target)
    with pytest.raises(EngineError, match=r"engine ort_training: .*x"):
        engine.step(np.zeros((2, 1, 3, 3), np.float32), np.zeros(2, np.int64), STEP)
    x, y = batches(bundle, (8,))[0]
    assert np.isfinite(engine.step(x, y, STEP).loss)  # and nothing else happened


def process_of(engine: OrtTrainingEngine) -> subprocess.Popen[bytes]:
    assert engine._worker is not None
    return engine._worker._process


def kill(engine: OrtTrainingEngine) -> None:
    process = process_of(engine)
    process.kill()
    process.wait(SECONDS)
