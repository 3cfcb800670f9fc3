"""The exported step against PyTorch eager: rows are masked dense training, exactly, whatever the masks do."""

import copy

import numpy as np
import pytest
import torch

from export.host import GraphHost
from export.parity import BATCHES
from spafl import algorithm
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats
from tests.export.models import Exported, exported
from trainer.local import begin_round, sgd_step, zero_momenta
from trainer.sparsify import masked_layers

TOLERANCE = 2e-5
"""Relative to a tensor's largest value, over ten steps that are not re-synchronised: a few hundred roundings."""

VARIANTS = {
    "plain": {"name": "plain"},
    "plain, as published": {"name": "plain", "gate": False, "mask_head": True},
    "norms": {"name": "normed"},
    "norms, as published": {"name": "normed", "gate": False},
    "residual": {"name": "residual"},
    "separable": {"name": "separable"},
    "cifar release, layer scale": {"name": "plain", "ste": "cifar-release", "scale": "layer"},
}


class Both:
    """One round on the graphs and in eager PyTorch, on the same batches."""

    def __init__(self, made: Exported, thresholds: Floats, seed: int = 0) -> None:
        self.made, self.draw = made, np.random.default_rng(seed)
        self.eager = copy.deepcopy(made.model)
        self.host = GraphHost(made, made.files)  # type: ignore[arg-type]
        state = {t.name: self.eager.state_dict()[t.name].numpy().copy() for t in made.state}
        base = (thresholds - self.draw.normal(0, 0.01, len(thresholds))).astype(np.float32)
        self.begun = self.host.begin_round(state, base, thresholds)
        self.collapsed = begin_round(self.eager, base, thresholds)
        self.momenta = zero_momenta(self.eager)

    def step(self, h: Hyperparameters, size: int = 12) -> tuple[float, float]:
        x = self.draw.standard_normal((size, *self.made.input.shape), np.float32)
        y = self.draw.integers(0, len(self.made.labels), size)
        loss, correct = self.host.step(x, y, h)
        done = sgd_step(self.eager, self.momenta, torch.from_numpy(x), torch.from_numpy(y), h)
        assert correct == done.correct
        return loss, done.loss

    def differences(self) -> dict[str, float]:
        """Relative difference of every state tensor, after the rows are put back."""
        self.host.end_round()
        found = {}
        for name, value in self.eager.state_dict().items():
            if name in self.host.state:
                expected = value.numpy()
                scale = max(np.abs(expected).max(), 1e-6)
                found[name] = float(np.abs(self.host.state[name] - expected).max() / scale)
        assert len(found) == len(self.made.state)
        return found

    def densities(self) -> dict[str, float]:
        return {name: float(layer.active().mean()) for name, layer in masked_layers(self.eager).items()}


def thresholds(made: Exported, density: float, seed: int = 1) -> Floats:
    state = {t.name: made.model.state_dict()[t.name].numpy() for t in made.state}
    return algorithm.thresholds_at(made.layout, state, density, np.random.default_rng(seed))


@pytest.mark.parametrize("density", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ten_steps_are_eager_training(variant: str, density: float) -> None:
    made = exported(**VARIANTS[variant])
    both = Both(made, thresholds(made, density))
    h = Hyperparameters(lr=0.02, threshold_lr=0.01, coeff=0.01)
    for size in BATCHES:
        loss, expected = both.step(h, max(size, 4))
        assert loss == pytest.approx(expected, rel=1e-5)
    assert max(both.differences().values()) < TOLERANCE, both.differences()


@pytest.mark.parametrize("clip", [0.05, 1e3])
@pytest.mark.parametrize("variant", ["plain", "norms"])
def test_clipping_counts_the_thresholds_of_filters_left_out(variant: str, clip: float) -> None:
    made = exported(**VARIANTS[variant])
    both = Both(made, thresholds(made, 0.3))
    # a large regulariser, so that pruned thresholds make up most of the norm
    h = Hyperparameters(lr=0.02, coeff=0.5, clip=clip)
    for _ in range(5):
        both.step(h)
    assert max(both.differences().values()) < TOLERANCE


@pytest.mark.parametrize("variant", ["plain", "plain, as published", "norms"])
def test_filters_pruned_during_the_round_stay_exact(variant: str) -> None:
    made = exported(**VARIANTS[variant])
    state = {t.name: made.model.state_dict()[t.name].numpy() for t in made.state}
    scores = np.concatenate([algorithm.scores(layer, state[layer.weight]) for layer in made.layout.layers])
    near = scores * np.random.default_rng(0).uniform(0.3, 0.98, len(scores))
    both = Both(made, near.astype(np.float32))
    before = both.densities()
    h = Hyperparameters(lr=0.002, threshold_lr=0.05, coeff=0.02)
    for _ in range(10):
        both.step(h)
    after = both.densities()
    assert any(0 < after[name] < before[name] for name in after), "the thresholds pruned nothing: no test"
    assert max(both.differences().values()) < TOLERANCE


@pytest.mark.parametrize("variant", ["plain", "norms"])
@pytest.mark.parametrize("active", [0, 1])
def test_a_layer_with_no_or_one_active_filter(variant: str, active: int) -> None:
    made = exported(**VARIANTS[variant])
    tau = thresholds(made, 0.6)
    layer = made.layout.layers[1]
    state = {t.name: made.model.state_dict()[t.name].numpy() for t in made.state}
    score = algorithm.scores(layer, state[layer.weight])
    tau[layer.span] = score * 1.5
    tau[layer.offset : layer.offset + active] = score[:active] * 0.5
    both = Both(made, tau)
    if active == 0:
        # the guard revives a collapsed layer; prune it again, behind the guard's back, in both
        assert both.collapsed == (layer.name,)
        assert both.begun["collapsed"].tolist() == [name.name == layer.name for name in made.layout.layers]
        assert both.begun[f"active.{layer.name}"].tolist() == list(range(layer.out))
        pruned = score.max() * 2
        both.host.state[layer.threshold] = np.full(layer.out, pruned, np.float32)
        masked_layers(both.eager)[layer.name].threshold.data.fill_(pruned)
        both.host.active[layer.name] = np.zeros(1, np.int64)
        both.host.synchronise(both.host.state, {n: v.numpy() for n, v in zero_momenta(both.eager).items()})
    h = Hyperparameters(lr=0.02, coeff=0.01)
    for _ in range(5):
        both.step(h)
    assert both.densities()[layer.name] == active / layer.out
    assert max(both.differences().values()) < TOLERANCE


@pytest.mark.parametrize("variant", VARIANTS)
def test_threshold_gradients_without_the_regulariser(variant: str) -> None:
    """With coeff = 0 all a threshold gets is the straight-through gradient, which exporters like to drop silently."""
    made = exported(**VARIANTS[variant])
    both = Both(made, thresholds(made, 0.7))
    both.step(Hyperparameters(lr=1e-3, coeff=0.0, momentum=0.0))
    gradients = {layer.name: both.host.momenta[layer.threshold] for layer in made.layout.layers}
    expected = {layer.name: both.momenta[layer.threshold].numpy() for layer in made.layout.layers}
    for name, gradient in gradients.items():
        assert np.abs(gradient - expected[name]).max() <= 1e-6 + 1e-5 * np.abs(expected[name]).max()
    moved = {name for name, gradient in gradients.items() if np.abs(gradient).max() > 1e-6}
    if variant.startswith("cifar"):
        assert not moved, "no score is further than 1 from its threshold here: the task must not move any"
    else:
        assert moved, "no threshold got a gradient"


def test_pruned_filters_get_no_task_gradient_behind_the_gate() -> None:
    made = exported("normed")
    both = Both(made, thresholds(made, 0.5))
    before = copy.deepcopy(both.eager.state_dict())
    for _ in range(3):
        both.step(Hyperparameters(lr=0.05, coeff=0.0))
    for name, layer in masked_layers(both.eager).items():
        pruned = layer.active() == 0
        assert pruned.any()
        assert torch.equal(layer.weight[pruned], before[f"{name}.weight"][pruned])
        assert torch.equal(layer.threshold[pruned], before[f"{name}.threshold"][pruned])
    for norm, layer in (("norm1", "conv1"), ("norm2", "conv2"), ("norm3", "fc1")):
        pruned = masked_layers(both.eager)[layer].active() == 0
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            after = both.eager.state_dict()[f"{norm}.{leaf}"]
            assert torch.equal(after[pruned], before[f"{norm}.{leaf}"][pruned])
            assert not torch.equal(after[~pruned], before[f"{norm}.{leaf}"][~pruned])


def test_forms_and_reasons() -> None:
    assert exported("plain").step.form == "rows"
    assert exported("plain", gate=False, mask_head=True).step.form == "rows"
    assert exported("normed").step.form == "rows"
    published = exported("normed", gate=False).step
    assert published.form == "dense"
    assert "not silent" in published.reason
    residual = exported("residual").step
    assert residual.form == "rows"
    assert residual.reason.startswith("stem, outer, inner:")
    rows = {tensor.name: tensor.layer for tensor in exported("residual").state if tensor.rows}
    sum_of = {f"{layer}.{leaf}": "stem" for layer in ("stem", "outer") for leaf in ("weight", "bias")}
    assert rows == {**sum_of, "inner.weight": "inner", "inner.bias": "inner"}
    mobilenet = exported("mobilenet").step
    assert mobilenet.form == "rows"
    assert "depthwise keeps all rows" in mobilenet.reason
