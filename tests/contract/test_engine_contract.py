"""One suite over every engine that can run here: they train, remember and infer the same from the same state."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.parity import KINDS, available, compare
from device_runtime.engines import ENGINES, Engine, EngineError, open_engine
from export.build import export_bundle
from spafl import algorithm
from spafl.bundle import Bundle
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats
from spafl.manifest import InputSpec
from spafl.step import ACTIVE
from tests.export.models import LABELS, Normed, Plain
from trainer.sparsify import sparsify

FLOAT32 = 2e-5
"""Relative to a tensor's largest value: some hundred roundings over the steps of a test."""
H = Hyperparameters(lr=0.02, threshold_lr=0.01, coeff=0.01, clip=2.0)

MODELS = {
    "plain": Plain,
    "normed": Normed,
}
PRESENT = tuple(available())


class Case:
    """A model, its bundle for all engines present, and a round's thresholds and batches."""

    def __init__(self, name: str, folder: Path) -> None:
        torch.manual_seed(0)
        plain = MODELS[name]()
        shape: tuple[int, ...] = plain.shape
        self.model: nn.Module = sparsify(plain)
        self.bundle: Bundle = export_bundle(
            self.model,
            folder / f"{name}.zip",
            name=name,
            input=InputSpec(shape=shape, mean=(0.0,) * shape[0], std=(1.0,) * shape[0]),
            labels=tuple(map(str, range(LABELS))),
            engines=PRESENT,
            parity=False,
        ).bundle
        draw = np.random.default_rng(4)
        self.state = self.bundle.initial_state()
        layout = self.bundle.manifest.layout
        self.target = algorithm.thresholds_at(layout, self.state, 0.5, draw)
        self.base = (self.target - draw.normal(0, 0.01, layout.size)).astype(np.float32)
        self.batches = [
            (draw.standard_normal((size, *shape), np.float32), draw.integers(0, LABELS, size))
            for size in (8, 8, 5, 8)
        ]

    def began(self, name: str) -> Engine:
        engine = open_engine(name, self.bundle)
        engine.begin_round(self.state, self.base, self.target)
        return engine


@pytest.fixture(scope="module", params=MODELS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp("bundles"))


@pytest.fixture(params=ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    if request.param not in PRESENT:
        pytest.skip(f"{request.param} cannot run here: spafl device engines tells why")
    return str(request.param)


def assert_close(got: dict[str, Floats], expected: dict[str, Floats]) -> None:
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key].dtype == value.dtype
        np.testing.assert_allclose(
            got[key], value, rtol=0, atol=FLOAT32 * max(np.abs(value).max(), 1e-3), err_msg=key
        )


def test_steps_equal_eager(case: Case, name: str) -> None:
    for parity in compare(open_engine(name, case.bundle), case.bundle, case.model, "a model"):
        assert parity.missed == ()
        # and something was compared
        assert parity.difference.keys() == set(KINDS)
        assert 0 < parity.difference["threshold gradients"] < 1e-4


def test_a_round_begins_as_the_reference_says(case: Case, name: str) -> None:
    layout = case.bundle.manifest.layout
    engine = open_engine(name, case.bundle)
    start = engine.begin_round(case.state, case.base, case.target)
    caught_up = algorithm.apply_global(layout, case.state, case.base, case.target)
    expected, collapsed = algorithm.reset_collapsed(layout, caught_up)
    assert start.density == pytest.approx(algorithm.densities(layout, caught_up))
    assert start.collapsed == tuple(collapsed)
    assert_close(engine.end_round(), {key: expected[key] for key in case.state})


def test_a_collapsed_layer_starts_over(case: Case, name: str) -> None:
    layer = case.bundle.manifest.layout.layers[0]
    target = case.target.copy()
    target[layer.span] = 1e3
    engine = open_engine(name, case.bundle)
    assert engine.begin_round(case.state, target, target).collapsed == (layer.name,)
    assert not engine.end_round()[layer.threshold].any()


def test_engines_take_over_from_each_other_between_any_two_steps(case: Case, name: str) -> None:
    if name == "onnx":
        pytest.skip("the one the others are compared with")
    alone, engines = case.began("onnx"), ("onnx", name)
    checkpoint = case.began(name).checkpoint()
    assert {key for key in checkpoint if key.startswith(ACTIVE)} == {
        key for key in alone.checkpoint() if key.startswith(ACTIVE)
    }
    for turn, (x, y) in enumerate(case.batches):
        expected = alone.step(x, y, H)
        other = open_engine(engines[turn % 2], case.bundle)
        other.resume(checkpoint)
        told = other.step(x, y, H)
        assert told.loss == pytest.approx(expected.loss, rel=1e-5)
        assert told.correct == expected.correct
        checkpoint = other.checkpoint()
    # the momentum of a bias before a norm is rounding alone; what momenta do to the state is compared
    expected_state, names = alone.checkpoint(), case.state.keys()
    assert_close({key: checkpoint[key] for key in names}, {key: expected_state[key] for key in names})


def test_engines_end_rounds_and_predict_alike(case: Case, name: str) -> None:
    engine, reference = case.began(name), case.began("onnx")
    for x, y in case.batches:
        engine.step(x, y, H)
        reference.step(x, y, H)
    trained, expected = engine.end_round(), reference.end_round()
    assert_close(trained, expected)
    x = np.random.default_rng(1).standard_normal((300, *case.model.shape), np.float32)  # type: ignore[misc]
    logits = engine.predict(expected, x)
    assert (logits.shape, logits.dtype) == ((300, LABELS), np.float32)
    assert_close({"logits": logits}, {"logits": reference.predict(expected, x)})


def test_what_was_given_away_is_not_written_to(case: Case, name: str) -> None:
    before = {key: value.copy() for key, value in case.state.items()}
    engine = case.began(name)
    checkpoint = engine.checkpoint()
    kept = {key: value.copy() for key, value in checkpoint.items()}
    engine.step(*case.batches[0], H)
    engine.resume(checkpoint)
    engine.step(*case.batches[0], H)
    engine.end_round()
    for held, copies in ((case.state, before), (checkpoint, kept)):
        assert all(np.array_equal(held[key], value) for key, value in copies.items())


def test_no_step_before_a_round(case: Case, name: str) -> None:
    engine = open_engine(name, case.bundle)
    for use in (lambda: engine.step(*case.batches[0], H), engine.checkpoint, engine.end_round):
        with pytest.raises(EngineError, match="no round is under way"):
            use()


def test_a_foreign_checkpoint_is_refused(case: Case, name: str) -> None:
    checkpoint = case.began(name).checkpoint()
    key = case.bundle.manifest.layout.layers[0].weight
    with pytest.raises(EngineError, match=key):
        open_engine(name, case.bundle).resume(checkpoint | {key: checkpoint[key][1:]})


def test_a_missing_engine_is_named_with_what_helps(case: Case) -> None:
    with pytest.raises(EngineError, match="no engine 'tflite': choose one of onnx, executorch, ort_training"):
        open_engine("tflite", case.bundle)
