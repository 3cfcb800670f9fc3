"""The engine against the plainest client of the same graphs and against eager PyTorch; its checkpoints, bit by bit."""

import copy
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from device_runtime.engines import EngineError, open_engine
from device_runtime.engines.onnx import OnnxEngine
from export.host import GraphHost
from spafl import algorithm
from spafl.bundle import Bundle
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats
from spafl.step import ACTIVE, MOMENTUM
from tests.export.bundles import bundle_of, state_of
from tests.export.models import Exported, exported
from trainer.local import begin_round, sgd_step, zero_momenta
from trainer.sparsify import masked_layers

FLOAT32 = 2e-5
"""Relative to a tensor's largest value: some hundred roundings over the steps of a test."""

H = Hyperparameters(lr=0.02, threshold_lr=0.01, coeff=0.01, clip=2.0)
PRUNING = Hyperparameters(lr=0.002, threshold_lr=0.05, coeff=0.02)
"""Raises thresholds that lie just below their scores above them within the round."""

VARIANTS = {
    "rows": {"name": "plain"},
    "rows with norms": {"name": "normed"},
    "dense": {"name": "normed", "gate": False},
}


class Case:
    """An exported model, its bundle, and the batches and thresholds of a round."""

    def __init__(self, made: Exported, bundle: Bundle) -> None:
        self.made, self.bundle = made, bundle
        self.state = state_of(made)
        draw = np.random.default_rng(4)
        self.target = algorithm.thresholds_at(made.layout, self.state, 0.5, draw)
        self.base = (self.target - draw.normal(0, 0.01, made.layout.size)).astype(np.float32)
        scores = [algorithm.scores(layer, self.state[layer.weight]) for layer in made.layout.layers]
        self.near = (draw.uniform(0.8, 0.99, made.layout.size) * np.concatenate(scores)).astype(np.float32)
        self.batches = [
            (
                draw.normal(size=(size, *made.input.shape)).astype(np.float32),
                draw.integers(0, len(made.labels), size),
            )
            for size in (8, 8, 5, 8, 3, 8)
        ]

    def engine(self, **options: int) -> OnnxEngine:
        engine = open_engine("onnx", self.bundle, **options)  # type: ignore[arg-type]
        assert isinstance(engine, OnnxEngine)
        return engine

    def trained(self, h: Hyperparameters, **options: int) -> dict[str, Floats]:
        engine = self.engine(**options)
        engine.begin_round(self.state, self.near, self.near)
        for x, y in self.batches:
            engine.step(x, y, h)
        return engine.end_round()


@pytest.fixture(scope="module", params=VARIANTS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    made = exported(**VARIANTS[request.param])
    roles = ("begin_round", "train_step")
    return Case(made, bundle_of(made, tmp_path_factory.mktemp("bundle") / "b", roles))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """The variant with norms in rows form, with its inference graph."""
    made = exported(name="normed")
    roles = ("begin_round", "train_step", "infer")
    return Case(made, bundle_of(made, tmp_path_factory.mktemp("bundle") / "b", roles))


def assert_close(got: Mapping[str, Floats], expected: Mapping[str, Floats]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(np.abs(value).max()), 1e-6)
        np.testing.assert_allclose(got[name], value, rtol=0, atol=FLOAT32 * scale, err_msg=name)


def assert_same_bytes(got: Mapping[str, NDArray], expected: Mapping[str, NDArray]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert (got[name].dtype, got[name].shape) == (value.dtype, value.shape), name
        assert got[name].tobytes() == value.tobytes(), name


def test_a_round_is_the_plain_clients_and_eager_pytorchs(case: Case) -> None:
    engine, host = case.engine(), GraphHost(case.made, case.made.files)  # type: ignore[arg-type]
    eager = copy.deepcopy(case.made.model)
    start = engine.begin_round(case.state, case.base, case.target)
    host.begin_round(case.state, case.base, case.target)
    begin_round(eager, case.base, case.target)
    layers = masked_layers(eager)
    assert start.density == pytest.approx(
        {layer.name: float(layers[layer.name].active().mean()) for layer in case.made.layout.layers}
    )
    assert start.collapsed == ()
    momenta = zero_momenta(eager)
    for x, y in case.batches:
        result, (loss, correct) = engine.step(x, y, H), host.step(x, y, H)
        assert (result.loss, result.correct) == (loss, correct)
        expected = sgd_step(eager, momenta, torch.from_numpy(x), torch.from_numpy(y), H)
        assert (result.loss, result.correct) == (pytest.approx(expected.loss, rel=1e-5), expected.correct)
    host.end_round()
    ended = engine.end_round()
    assert_same_bytes(ended, host.state)
    assert_close(ended, {name: eager.state_dict()[name].numpy() for name in case.state})


def test_the_new_state_has_the_manifests_tensors_and_the_old_stays_as_it_was(case: Case) -> None:
    before = {name: value.copy() for name, value in case.state.items()}
    ended = case.trained(H)
    tensors = {tensor.name: tensor.shape for tensor in case.bundle.manifest.state}
    assert {name: value.shape for name, value in ended.items()} == tensors
    assert all(value.dtype == np.float32 and np.isfinite(value).all() for value in ended.values())
    assert_same_bytes(case.state, before)
    assert all(not np.array_equal(ended[name], before[name]) for name in before if name.endswith(".weight"))


@pytest.mark.parametrize("threads", [1, 2])
def test_a_checkpoint_after_any_step_goes_on_bit_by_bit(case: Case, threads: int) -> None:
    straight = case.engine(threads=threads)
    straight.begin_round(case.state, case.near, case.near)
    checkpoints, losses = [straight.checkpoint()], []
    for x, y in case.batches:
        losses.append(straight.step(x, y, PRUNING).loss)
        checkpoints.append(straight.checkpoint())
    frozen = [{name: value.copy() for name, value in taken.items()} for taken in checkpoints]
    expected = straight.end_round()

    densities = [algorithm.densities(case.made.layout, taken) for taken in checkpoints]
    assert any(0 < densities[-1][name] < densities[0][name] for name in densities[0]), "nothing was pruned"
    for at, checkpoint in enumerate(checkpoints):
        assert_same_bytes(checkpoint, frozen[at])  # what was taken is no view of buffers that move on
        engine = case.engine(threads=threads)
        engine.resume(checkpoint)
        assert_same_bytes(engine.checkpoint(), checkpoint)
        for (x, y), loss in zip(case.batches[at:], losses[at:], strict=True):
            assert engine.step(x, y, PRUNING).loss == loss
        assert_same_bytes(engine.end_round(), expected)
        assert_same_bytes(checkpoint, frozen[at])


def test_a_checkpoint_has_whole_tensors_whatever_the_form(case: Case) -> None:
    engine = case.engine()
    engine.begin_round(case.state, case.base, case.target)
    engine.step(*case.batches[0], H)
    checkpoint = engine.checkpoint()
    manifest = case.bundle.manifest
    shapes = {tensor.name: tensor.shape for tensor in manifest.state}
    shapes |= {MOMENTUM + tensor.name: tensor.shape for tensor in manifest.state if tensor.trained}
    active = {str(tensor.layer) for tensor in manifest.state if tensor.rows}
    assert checkpoint.keys() == {*shapes, *(ACTIVE + layer for layer in active)}
    assert {name: checkpoint[name].shape for name in shapes} == shapes
    caught_up = algorithm.apply_global(manifest.layout, case.state, case.base, case.target)
    for layer in manifest.layout.layers:
        if layer.name in active:
            index = checkpoint[ACTIVE + layer.name]
            assert index.dtype == np.int64
            np.testing.assert_array_equal(index, np.flatnonzero(algorithm.mask(layer, caught_up)))
            pruned = np.setdiff1d(np.arange(layer.out), index)
            assert len(pruned)
            assert not checkpoint[MOMENTUM + layer.weight][pruned].any()
            # the thresholds of filters left out move all the same: the regulariser reaches them
            assert checkpoint[MOMENTUM + layer.threshold][pruned].all()


def test_momentum_lives_from_batch_to_batch_and_starts_at_0_each_round(case: Case) -> None:
    """Made anew for each batch, momentum would do nothing: the published code's mistake this must not repeat."""
    engine = case.engine()
    for _ in (0, 1):  # the second round does not inherit the first one's
        engine.begin_round(case.state, case.base, case.target)
        assert not any(
            value.any() for name, value in engine.checkpoint().items() if name.startswith(MOMENTUM)
        )
        engine.step(*case.batches[0], H)
        first = engine.checkpoint()
        # a step that learns nothing and clips every gradient away leaves mu times the momentum there was
        engine.step(*case.batches[1], Hyperparameters(lr=1e-9, threshold_lr=0.0, momentum=0.5, clip=1e-9))
        second = engine.checkpoint()
        for name, value in first.items():
            if name.startswith(MOMENTUM):
                np.testing.assert_allclose(second[name], 0.5 * value, rtol=1e-5, atol=2e-9)
                assert value.any()


def test_without_clipping_there_is_none(case: Case) -> None:
    engine = case.engine()
    engine.begin_round(case.state, case.base, case.target)
    engine.step(*case.batches[0], Hyperparameters(lr=1e-3, clip=None, coeff=10.0))
    unclipped = engine.checkpoint()
    engine.begin_round(case.state, case.base, case.target)
    engine.step(*case.batches[0], Hyperparameters(lr=1e-3, clip=1e6, coeff=10.0))
    assert_same_bytes(engine.checkpoint(), unclipped)


def test_two_threads_train_the_same(case: Case) -> None:
    assert_close(case.trained(H, threads=2), case.trained(H))


def test_nothing_happens_before_a_round_begins_or_after_it_ended(case: Case) -> None:
    engine = case.engine()
    for ended in (False, True):
        if ended:
            engine.begin_round(case.state, case.base, case.target)
            engine.end_round()
        for act in (lambda: engine.step(*case.batches[0], H), engine.checkpoint, engine.end_round):
            with pytest.raises(EngineError, match="no round is under way: call begin_round or resume first"):
                act()


def test_a_collapsed_layer_is_named_and_revived(case: Case) -> None:
    layer = case.made.layout.layers[0]
    target = case.target.copy()
    target[layer.span] = 99.0
    start = case.engine().begin_round(case.state, target, target)
    assert start.collapsed == (layer.name,)
    assert start.density[layer.name] == 0.0


def test_a_checkpoint_of_another_model_is_refused(case: Case) -> None:
    engine = case.engine()
    engine.begin_round(case.state, case.base, case.target)
    checkpoint = engine.checkpoint()
    for name, value in checkpoint.items():
        wrong = [{k: v for k, v in checkpoint.items() if k != name}]
        if not name.startswith(ACTIVE):
            wrong.append({**checkpoint, name: value[:-1]})
        else:
            wrong += [
                {**checkpoint, name: np.array([10_000])},
                {**checkpoint, name: value.astype(np.float32)},
            ]
        for other in wrong:
            with pytest.raises(EngineError, match="not of this bundle") as error:
                engine.resume(other)
            assert name in str(error.value)
    assert_same_bytes(engine.checkpoint(), checkpoint)


def test_predictions_are_of_the_state_given_and_of_no_other(rows: Case) -> None:
    x = np.concatenate([x for x, _ in rows.batches])
    model = copy.deepcopy(rows.made.model).eval()
    engine = rows.engine()
    for factor in (1.0, 0.5):
        state = {name: value * np.float32(factor) for name, value in rows.state.items()}
        model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=False)
        with torch.no_grad():
            expected = model(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(
            engine.predict(state, x), expected, rtol=0, atol=FLOAT32 * np.abs(expected).max()
        )


def test_predictions_in_batches_are_those_of_one(rows: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.concatenate([x for x, _ in rows.batches])
    engine = rows.engine()
    whole = engine.predict(rows.state, x)
    monkeypatch.setattr("device_runtime.engines.onnx.PREDICTION_BATCH", 7)
    batched = engine.predict(rows.state, x)
    assert batched.shape == (len(x), len(rows.made.labels))
    np.testing.assert_allclose(batched, whole, rtol=0, atol=FLOAT32 * np.abs(whole).max())
    assert engine.predict(rows.state, x[:0]).shape == (0, len(rows.made.labels))


def test_engines_there_are_not(rows: Case) -> None:
    with pytest.raises(EngineError, match="no engine 'tflite': choose one of onnx"):
        open_engine("tflite", rows.bundle)
