"""Local training against gradients and updates worked out by hand in float64 numpy."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from spafl import algorithm
from spafl.hyperparameters import Hyperparameters
from trainer.local import batches, begin_round, densities, evaluate, sgd_step, train_locally, zero_momenta
from trainer.models import LeNet5
from trainer.sparsify import layout_of, sparsify

EXACT = {"rtol": 2e-5, "atol": 2e-7}
"""float32 against float64 over sums of tens of terms of order 1: a few units in the last place each."""


class Tiny(nn.Module):
    """Two linear layers without anything between: every gradient fits on a page."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6, bias=False)
        self.head = nn.Linear(6, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.first(x))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(F.relu(self.norm(self.first(x))))


def tiny(kind: type[nn.Module] = Tiny, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    model = sparsify(kind(), **options)
    with torch.no_grad():
        # half of the filters pruned, none near its threshold
        score = model.first.weight.abs().mean(1)
        model.first.threshold.copy_(score + torch.tensor([-0.1, 0.1] * 3))
    return model


def examples(n: int = 11, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, 5)).astype(np.float32), draw.integers(0, 3, n)


def state(model: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().astype(np.float64) for name, value in model.state_dict().items()}


def by_hand(
    s: dict[str, np.ndarray], x: np.ndarray, y: np.ndarray, coeff: float, gate: bool
) -> dict[str, np.ndarray]:
    """Gradients of Tiny: logits = ((x Wm^T) * gate) H^T, cross entropy, coeff sum exp(-tau)."""
    w, tau, head = s["first.weight"], s["first.threshold"], s["head.weight"]
    mask = (np.abs(w).mean(1) > tau).astype(float)
    masked = w * mask[:, None]
    hidden = x @ masked.T  # (N, 6)
    logits = hidden @ head.T
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    d_logits = (p - np.eye(3)[y]) / len(y)  # (N, 3)
    d_hidden = d_logits @ head  # (N, 6)
    d_masked = (d_hidden * (mask if gate else 1.0)).T @ x  # dL/dWm (6, 5)
    through = (d_masked * w).sum(1)  # sum_j dL/dWm_ij W_ij: the straight-through term
    return {
        "first.weight": d_masked * mask[:, None] + through[:, None] * np.sign(w) / w.shape[1],
        "first.threshold": -through - coeff * np.exp(-tau),
        "head.weight": d_logits.T @ hidden,
    }


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("coeff", [0.0, 0.3])
@pytest.mark.parametrize("clip", [None, 0.05, 1e5])
def test_three_steps_are_the_ones_worked_out_by_hand(gate: bool, coeff: float, clip: float | None) -> None:
    model = tiny(gate=gate)
    x, y = examples()
    h = Hyperparameters(lr=0.05, threshold_lr=0.02, momentum=0.8, coeff=coeff, clip=clip)
    momenta, expected = zero_momenta(model), state(model)
    v = {name: np.zeros_like(value) for name, value in expected.items()}
    for _ in range(3):
        step = sgd_step(model, momenta, torch.from_numpy(x), torch.from_numpy(y), h)
        gradients = by_hand(expected, x.astype(np.float64), y, coeff, gate)
        norm = math.sqrt(sum((g**2).sum() for g in gradients.values()))
        factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
        assert (factor < 1) == (clip == 0.05)
        for name, gradient in gradients.items():
            v[name] = 0.8 * v[name] + factor * gradient
            expected[name] = expected[name] - (0.02 if name == "first.threshold" else 0.05) * v[name]
        assert math.isfinite(step.loss)
    for name, value in state(model).items():
        np.testing.assert_allclose(value, expected[name], err_msg=name, **EXACT)
    if gate and coeff == 0:
        # gated, a pruned filter hears nothing of the task; ungated, straight-through still reaches it
        assert (
            state(model)["first.threshold"][1::2].tolist() == state(tiny())["first.threshold"][1::2].tolist()
        )


def test_the_loss_is_the_task_loss_and_correct_is_counted_before_the_step() -> None:
    model = tiny()
    x, y = examples()
    loss, accuracy = evaluate(model, x, y)
    step = sgd_step(
        model, zero_momenta(model), torch.from_numpy(x), torch.from_numpy(y), Hyperparameters(coeff=5)
    )
    assert step.loss == pytest.approx(loss, rel=1e-6)
    assert step.correct == round(accuracy * len(y))


def test_momentum_lives_through_the_round_and_starts_anew_with_each() -> None:
    x, y = examples(12)
    h = Hyperparameters(lr=0.05, momentum=0.9, batch_size=4, epochs=2)
    model, twin = tiny(), tiny()
    train_locally(model, x, y, h, seed=3)
    momenta = zero_momenta(twin)
    for indices in batches(12, 4, 2, 3):
        sgd_step(twin, momenta, torch.from_numpy(x[indices]), torch.from_numpy(y[indices]), h)
    # the same operations in the same order
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    forgetful = tiny()
    for indices in batches(12, 4, 2, 3):
        sgd_step(
            forgetful, zero_momenta(forgetful), torch.from_numpy(x[indices]), torch.from_numpy(y[indices]), h
        )
    assert not torch.allclose(model.first.weight, forgetful.first.weight, atol=1e-3)


@pytest.mark.parametrize(("n", "batch_size", "epochs"), [(11, 4, 3), (8, 4, 1), (3, 64, 2)])
def test_epochs_and_batches_are_respected(n: int, batch_size: int, epochs: int) -> None:
    x, y = examples(n)
    done = train_locally(tiny(), x, y, Hyperparameters(batch_size=batch_size, epochs=epochs))
    assert done.steps == len(done.losses) == epochs * math.ceil(n / batch_size)
    order = list(batches(n, batch_size, epochs, 0))
    per_epoch = math.ceil(n / batch_size)
    for epoch in range(epochs):
        seen = np.concatenate(order[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert sorted(seen) == list(range(n))
    last = done.losses[-per_epoch:]
    sizes = [len(indices) for indices in order[-per_epoch:]]
    assert done.loss == pytest.approx(np.average(last, weights=sizes))


def test_an_example_alone_in_a_batch_cannot_train_batch_norm() -> None:
    x, y = examples(9)
    h = Hyperparameters(batch_size=4, epochs=2)
    assert train_locally(tiny(Normed), x, y, h).dropped == 2
    assert train_locally(tiny(), x, y, h).dropped == 0


def test_training_learns_and_lets_evaluation_be() -> None:
    draw = np.random.default_rng(0)
    y = draw.integers(0, 3, 60)
    x = (np.eye(3, 5)[y] + 0.1 * draw.normal(size=(60, 5))).astype(np.float32)
    model = tiny()
    before = state(model)
    assert evaluate(model, x, y, batch_size=7) == pytest.approx(evaluate(model, x, y), rel=1e-6)
    assert all(np.array_equal(before[name], value) for name, value in state(model).items())
    done = train_locally(model, x, y, Hyperparameters(lr=0.1, epochs=20, batch_size=8))
    assert done.accuracy > 0.95
    assert evaluate(model, x, y)[1] > 0.95
    assert done.density == densities(model)


def test_statistics_of_pruned_channels_rest() -> None:
    model = tiny(Normed)
    with torch.no_grad():
        model.norm.running_mean.fill_(5.0)
    x, y = examples()
    sgd_step(model, zero_momenta(model), torch.from_numpy(x), torch.from_numpy(y), Hyperparameters())
    assert (model.norm.running_mean[1::2] == 5.0).all()
    assert (model.norm.running_mean[0::2] != 5.0).all()


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from(["unit", "layer"]))
def test_begin_round_is_the_numpy_reference(seed: int, scale: str) -> None:
    torch.manual_seed(seed)
    model = sparsify(LeNet5(), scale=scale)
    layout, draw = layout_of(model), np.random.default_rng(seed)
    base = draw.normal(0, 0.5, layout.size).astype(np.float32)
    target = base + draw.normal(0, 0.5, layout.size).astype(np.float32)
    if seed % 2:
        target[layout.layers[1].span] = 50.0  # this layer collapses
    tensors = {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}
    expected, names = algorithm.reset_collapsed(layout, algorithm.apply_global(layout, tensors, base, target))
    assert begin_round(model, base, target) == tuple(names)
    assert ("conv2" in names) == bool(seed % 2)
    for name, value in model.state_dict().items():
        # one subtraction and one product of numbers below 100, in float32
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_catching_up_over_rounds_missed_is_catching_up_one_by_one() -> None:
    model, twin = tiny(), tiny()
    with torch.no_grad():
        for one in (model, twin):
            one.first.weight += 1.0  # no sum of weights changes its sign on the way
    draw = np.random.default_rng(1)
    versions = [np.zeros(6, np.float32), *draw.normal(0, 0.1, (5, 6)).astype(np.float32)]
    begin_round(model, versions[0], versions[-1])
    for base, target in itertools.pairwise(versions):
        begin_round(twin, base, target)
    np.testing.assert_allclose(model.first.weight.detach(), twin.first.weight.detach(), rtol=1e-6)


def test_a_collapsed_layer_wakes_and_is_named_once() -> None:
    model = tiny()
    high = np.full(6, 9.0, np.float32)
    assert begin_round(model, high, high) == ("first",)
    assert model.first.threshold.tolist() == [0.0] * 6
    low = np.zeros(6, np.float32)
    assert begin_round(model, low, low) == ()
    assert densities(model) == {"first": 1.0}
