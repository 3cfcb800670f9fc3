"""The ExecuTorch engine: free of PyTorch, in step with the onnx engine from any checkpoint, honest when it fails."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import nn

from device_runtime.engines import Engine, EngineError, open_engine
from device_runtime.engines import executorch_library as library
from device_runtime.engines.executorch import ExecutorchEngine
from device_runtime.engines.executorch_official import OfficialProgram
from export.build import _engine
from export.compact import CompactModel
from export.executorch_programs import MAX_BATCH, RELEASE, evaluate_program, train_step_program
from export.round import begin_round_graph
from export.training import form, state_tensors, train_step_graph
from spafl import algorithm
from spafl.bundle import INITIAL_STATE, Bundle, write_bundle
from spafl.hyperparameters import Hyperparameters
from spafl.manifest import EngineFiles, InputSpec, Manifest
from tests.device_runtime.small_model import small_model
from trainer.models import LeNet5
from trainer.sparsify import layout_of, sparsify

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="pip install --no-deps executorch==1.5.1"
)

FLOAT32 = 2e-5
"""Relative to a tensor's largest value: some hundred roundings over the steps of a test."""
H = Hyperparameters(lr=0.02, threshold_lr=0.01, coeff=0.01, clip=2.0)

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "small": (small_model, (1, 8, 8), 3),
    "lenet5": (LeNet5, (1, 28, 28), 10),
}


class Case:
    """A model, a bundle with its training steps for both engines, and a round's thresholds and batches."""

    def __init__(self, name: str, path: Path) -> None:
        make, shape, labels = MODELS[name]
        torch.manual_seed(0)
        self.model = sparsify(make())
        training = CompactModel(self.model, shape, dropped=lambda group: group.exact, training=True)
        tensors, layout = state_tensors(self.model, training), layout_of(self.model)
        graphs = {
            "begin_round": begin_round_graph(layout, tensors, training.dropped),
            "train_step": train_step_graph(training, tensors, shape),
        }
        files = {f"{role}.onnx": graph.SerializeToString() for role, graph in graphs.items()}
        files["train_step.pte"], _ = train_step_program(self.model, tensors, shape)
        if name == "small":
            files["evaluate.pte"], _ = evaluate_program(self.model, tensors, shape)
        programs = {Path(file).stem: file for file in files if file.endswith(".pte")}
        state = {tensor.name: self.model.state_dict()[tensor.name].numpy() for tensor in tensors}
        manifest = Manifest(
            name=name,
            layout=layout,
            state=tensors,
            input=InputSpec(shape=shape, mean=(0.0,), std=(1.0,)),
            labels=tuple(map(str, range(labels))),
            train_step=form(training),
            compaction=(),
            engines={
                "onnx": _engine({role: onnx.load_from_string(files[f"{role}.onnx"]) for role in graphs}),
                "executorch": EngineFiles(files=programs, requires={"executorch": RELEASE}, operators={}),
            },
            files={file: {"bytes": 0, "sha256": "0" * 64} for file in files},
            producer={},
        )
        self.bundle = write_bundle(path, manifest, {**files, INITIAL_STATE: safetensors.numpy.save(state)})
        draw = np.random.default_rng(4)
        self.state = self.bundle.initial_state()
        self.target = algorithm.thresholds_at(layout, self.state, 0.5, draw)
        self.base = (self.target - draw.normal(0, 0.01, layout.size)).astype(np.float32)
        self.batches = [
            (draw.standard_normal((size, *shape), np.float32), draw.integers(0, labels, size))
            for size in (8, 8, 5, 8, 3, 8)
        ]

    def began(self, engine: str) -> Engine:
        opened = open_engine(engine, self.bundle)
        opened.begin_round(self.state, self.base, self.target)
        return opened


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    library.build(library.wheel())


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("small", tmp_path_factory.mktemp("bundle") / "small.zip")


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    if request.param == "small":
        return request.getfixturevalue("small")  # type: ignore[no-any-return]
    return Case(request.param, tmp_path_factory.mktemp("bundle") / f"{request.param}.zip")


def assert_close(got: Mapping[str, NDArray[np.generic]], expected: Mapping[str, NDArray[np.generic]]) -> None:
    """A momentum is measured by the largest of them: a bias before a norm has a gradient of 0 but for rounding."""
    assert set(got) == set(expected)
    largest = max(
        (np.abs(value).max() for name, value in expected.items() if "momentum" in name), default=0.0
    )
    for name, value in expected.items():
        if value.dtype == np.int64:
            assert np.array_equal(got[name], value), name
            continue
        scale = max(np.abs(value).max(), 1e-3 * largest if "momentum" in name else 0.0, 1e-12)
        assert np.abs(got[name] - value).max() <= FLOAT32 * scale, name


def test_a_round_goes_on_with_the_other_engine_at_any_step(case: Case) -> None:
    alone = case.began("onnx")
    checkpoint = case.began("executorch").checkpoint()
    for turn, (x, y) in enumerate(case.batches):
        expected = alone.step(x, y, H)
        engine = open_engine(("executorch", "onnx")[turn % 2], case.bundle)
        engine.resume(checkpoint)
        told = engine.step(x, y, H)
        assert told.loss == pytest.approx(expected.loss, rel=FLOAT32)
        assert told.correct == expected.correct
        checkpoint = engine.checkpoint()
    assert_close(checkpoint, alone.checkpoint())


def test_rounds_go_on_with_the_other_engine(case: Case) -> None:
    results = []
    for engines in (("onnx", "onnx"), ("executorch", "onnx"), ("onnx", "executorch")):
        state = case.state
        for name in engines:
            engine = open_engine(name, case.bundle)
            thresholds = case.bundle.manifest.layout.join(state)
            start = engine.begin_round(state, thresholds, case.target)
            for x, y in case.batches[:3]:
                engine.step(x, y, H)
            state = engine.end_round()
        results.append((start, state))
    for start, state in results[1:]:
        assert start.collapsed == results[0][0].collapsed
        assert start.density == pytest.approx(results[0][0].density, abs=1e-6)
        assert_close(state, results[0][1])


def test_training_never_loads_torch(small: Case) -> None:
    script = """
import json, sys
import numpy as np
from device_runtime.engines import open_engine, require_engine
from spafl.bundle import Bundle
from spafl.hyperparameters import Hyperparameters
require_engine("executorch")
bundle = Bundle.open(sys.argv[1])
engine, state, thresholds = open_engine("executorch", bundle), bundle.initial_state(), bundle.initial_thresholds()
engine.begin_round(state, thresholds, thresholds)
draw = np.random.default_rng(0)
x, y = draw.standard_normal((8, *bundle.manifest.input.shape), np.float32), draw.integers(0, 3, 8)
losses = [engine.step(x, y, Hyperparameters(lr=0.1)).loss for _ in range(5)]
logits = engine.predict(engine.end_round(), x)
loaded = [name for name in ("torch", "onnxruntime", "executorch") if name in sys.modules]
print(json.dumps({"losses": losses, "logits": list(logits.shape), "loaded": loaded}))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(small.bundle.path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["loaded"] == []
    assert told["logits"] == [8, 3]
    assert told["losses"][-1] < told["losses"][0]
    assert done.stderr == ""  # the runtime's own log stays out of the device's


def test_state_written_over_itself_is_the_state_written_elsewhere(small: Case) -> None:
    engine = small.began("executorch")
    assert isinstance(engine, ExecutorchEngine)
    engine.step(*small.batches[0], H)
    checkpoint = engine.checkpoint()
    x, y = small.batches[1]
    scalars = [np.array(value, np.float32) for value in H.scalars().values()]
    names = [tensor.name for tensor in engine.manifest.state]
    names += [f"momentum.{tensor.name}" for tensor in engine.manifest.state if tensor.trained]
    program = engine._open("train_step")
    _, _, *elsewhere = program.run("forward", [x, y, *scalars, *(checkpoint[name] for name in names)])
    engine.step(x, y, H)
    after = engine.checkpoint()
    for name, value in zip(names, elsewhere, strict=True):
        assert value.tobytes() == after[name].tobytes(), name


def test_rounds_follow_each_other(small: Case) -> None:
    """Between them the step's program and its memory are let go."""
    engine, again = small.began("executorch"), small.began("executorch")
    assert isinstance(engine, ExecutorchEngine)
    for step in (engine.step, again.step):
        step(*small.batches[0], H)
    state = engine.end_round()
    assert engine._step_program is None
    engine.begin_round(state, small.target, small.target)
    other = open_engine("executorch", small.bundle)
    other.begin_round(again.end_round(), small.target, small.target)
    assert engine.step(*small.batches[1], H) == other.step(*small.batches[1], H)


def test_logits_are_those_of_the_masked_model(small: Case) -> None:
    x = np.random.default_rng(1).standard_normal((2 * MAX_BATCH + 7, 1, 8, 8), np.float32)
    engine = open_engine("executorch", small.bundle)
    with torch.no_grad():
        expected = small.model.eval()(torch.from_numpy(x)).numpy()
    assert_close({"logits": engine.predict(small.state, x)}, {"logits": expected})
    assert engine.predict(small.state, x[:0]).shape == (0, 3)


def test_the_official_runtime_trains_the_same_where_no_library_is_built(
    small: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> tuple[Path, Path]:
        raise EngineError("not built yet")

    through_shim = small.began("executorch")
    monkeypatch.setattr(library, "find", missing)
    official = small.began("executorch")
    assert isinstance(official, ExecutorchEngine)
    assert isinstance(official._open("train_step"), OfficialProgram)
    for x, y in small.batches[:3]:
        expected, told = through_shim.step(x, y, H), official.step(x, y, H)
        assert (told.loss, told.correct) == (expected.loss, expected.correct)
    assert_close(official.checkpoint(), through_shim.checkpoint())
    assert_close(
        {"logits": official.predict(small.state, x)}, {"logits": through_shim.predict(small.state, x)}
    )
    with pytest.raises(EngineError, match=f"takes 1 to {MAX_BATCH} examples"):
        official.step(*_batch(MAX_BATCH + 1), H)


def test_more_threads_train_the_same(small: Case) -> None:
    one, two = (open_engine("executorch", small.bundle, threads=threads) for threads in (1, 2))
    for engine in (one, two):
        engine.begin_round(small.state, small.base, small.target)
        engine.step(*small.batches[0], H)
    assert_close(two.checkpoint(), one.checkpoint())
    open_engine("executorch", small.bundle).predict(small.state, small.batches[0][0])  # back to one


def _batch(size: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return np.zeros((size, 1, 8, 8), np.float32), np.zeros(size, np.int64)


def test_a_batch_it_cannot_take_is_refused_and_nothing_is_lost(small: Case) -> None:
    engine = small.began("executorch")
    before = engine.checkpoint()
    with pytest.raises(
        EngineError, match=f"takes 1 to {MAX_BATCH} examples, got {MAX_BATCH + 1}.*batch_size"
    ):
        engine.step(*_batch(MAX_BATCH + 1), H)
    with pytest.raises(EngineError, match="got 0"):
        engine.step(*_batch(0), H)
    with pytest.raises(EngineError, match=r"expected x \(n, 1, 8, 8\) and y \(n,\)"):
        engine.step(_batch(4)[0], _batch(5)[1], H)
    with pytest.raises(EngineError, match=r"expected x \(n, 1, 8, 8\)"):
        engine.step(np.zeros((4, 1, 8, 7), np.float32), _batch(4)[1], H)
    after = engine.checkpoint()
    assert all(after[name].tobytes() == value.tobytes() for name, value in before.items())
    engine.step(*_batch(MAX_BATCH), H)


def test_a_step_that_fails_leaves_no_state_that_could_be_taken_for_one(
    small: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small.began("executorch")
    assert isinstance(engine, ExecutorchEngine)
    checkpoint = engine.checkpoint()
    expected = engine.step(*small.batches[0], H)
    program = engine._step_program
    assert program is not None

    def failing(*arguments: object) -> list[NDArray[np.generic]]:
        raise EngineError("ExecuTorch cannot run forward")

    with monkeypatch.context() as patch:
        patch.setattr(program, "run", failing)
        with pytest.raises(EngineError, match="cannot run forward"):
            engine.step(*small.batches[1], H)
    for use in (lambda: engine.step(*small.batches[1], H), engine.checkpoint, engine.end_round):
        with pytest.raises(EngineError, match="left no state: resume from a checkpoint"):
            use()
    engine.resume(checkpoint)
    assert engine.step(*small.batches[0], H) == expected


def test_programs_of_another_release_are_refused(small: Case, tmp_path: Path) -> None:
    manifest = small.bundle.manifest
    entry = replace(manifest.engines["executorch"], requires={"executorch": "1.4.1"})
    other = replace(manifest, engines={**manifest.engines, "executorch": entry})
    files = {name: small.bundle.read(name) for name in manifest.files}
    bundle: Bundle = write_bundle(tmp_path / "other.zip", other, files)
    with pytest.raises(
        EngineError, match=rf"for ExecuTorch 1\.4\.1, this engine runs those of {RELEASE}: export"
    ):
        open_engine("executorch", bundle)
