"""Gated batch norms: torch's own numbers for active channels, exactly nothing for pruned ones."""

import copy

import pytest
import torch
from torch import Tensor, nn

from spafl.errors import SettingsError
from trainer.masked import Masked, MaskedConv1d, MaskedConv2d, MaskedLinear
from trainer.norm import BatchNorm, GatedBatchNorm, gated, normalise

EXACT = {"rtol": 1e-11, "atol": 1e-13}
"""float64: the variance is won back from 1 / sqrt(variance + eps), which costs a few digits."""

PRUNED = torch.tensor([False, True, True, False, True])


def pair(kind: str, affine: bool = True, prune: bool = True) -> tuple[Masked, BatchNorm, Tensor]:
    """A masked layer, a norm of its own statistics behind it, and values the norm takes."""
    torch.manual_seed(0)
    source: Masked
    norm: BatchNorm
    if kind == "conv":
        source = MaskedConv2d(nn.Conv2d(2, 5, 3), gate=False)
        norm = nn.BatchNorm2d(5, affine=affine, momentum=0.3, eps=1e-4)
        x = torch.randn(3, 5, 4, 2, dtype=torch.float64)
    elif kind == "conv 1-D":
        source = MaskedConv1d(nn.Conv1d(2, 5, 3), gate=False)
        norm = nn.BatchNorm1d(5, affine=affine, momentum=0.3, eps=1e-4)
        x = torch.randn(3, 5, 7, dtype=torch.float64)
    else:
        source = MaskedLinear(nn.Linear(2, 5), gate=False)
        norm = nn.BatchNorm1d(5, affine=affine, momentum=0.3, eps=1e-4)
        x = torch.randn(6, 5, dtype=torch.float64)
    source.threshold.data.fill_(-1.0)
    if prune:
        source.threshold.data[PRUNED] = 9.0
    with torch.no_grad():
        for value in (*norm.parameters(), norm.running_mean):
            value += torch.randn_like(value)
    return source.double(), norm.double(), x * 2 + 1


CASES = pytest.mark.parametrize(
    ("kind", "affine"),
    [("conv", True), ("conv", False), ("conv 1-D", True), ("conv 1-D", False), ("linear", True)],
)


def pick(x: Tensor, channels: Tensor) -> Tensor:
    return x[:, channels]


@CASES
@pytest.mark.parametrize("training", [True, False])
def test_without_pruned_channels_it_is_torchs_norm(kind: str, affine: bool, training: bool) -> None:
    source, norm, x = pair(kind, affine, prune=False)
    mine = gated(copy.deepcopy(norm), source).train(training)
    norm.train(training)
    torch.testing.assert_close(mine(x), norm(x), **EXACT)
    torch.testing.assert_close(mine.running_mean, norm.running_mean, **EXACT)
    torch.testing.assert_close(mine.running_var, norm.running_var, **EXACT)


@CASES
@pytest.mark.parametrize("training", [True, False])
def test_a_pruned_channel_is_0_and_learns_nothing(kind: str, affine: bool, training: bool) -> None:
    source, norm, x = pair(kind, affine)
    x[:, PRUNED] = 0.25  # as a pruned filter leaves it: its bias everywhere
    x.requires_grad_()
    before = copy.deepcopy(norm)
    mine = gated(norm, source).train(training)
    y = mine(x)
    assert (pick(y, PRUNED) == 0).all()
    gradients = torch.autograd.grad(y.square().sum() + y.sum(), [x, *norm.parameters()])
    assert (pick(gradients[0], PRUNED) == 0).all()
    assert all((gradient[PRUNED] == 0).all() and gradient[~PRUNED].all() for gradient in gradients[1:])

    ordinary = copy.deepcopy(before).train(training)
    other = x.detach().clone().requires_grad_()
    expected = ordinary(other) * (~PRUNED).double().view(-1, *[1] * (x.dim() - 2))
    torch.testing.assert_close(y, expected, **EXACT)
    wanted = torch.autograd.grad(expected.square().sum() + expected.sum(), [other, *ordinary.parameters()])
    for got, value in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-11)


@CASES
def test_statistics_rest_while_a_channel_is_pruned(kind: str, affine: bool) -> None:
    source, norm, x = pair(kind, affine)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    ordinary = copy.deepcopy(norm)
    mine = gated(norm, source)
    for _ in range(2):
        mine(x)
        ordinary(x)
    assert torch.equal(mine.running_mean[PRUNED], mean[PRUNED])
    assert torch.equal(mine.running_var[PRUNED], variance[PRUNED])
    torch.testing.assert_close(mine.running_mean[~PRUNED], ordinary.running_mean[~PRUNED], **EXACT)
    torch.testing.assert_close(mine.running_var[~PRUNED], ordinary.running_var[~PRUNED], **EXACT)
    source.threshold.data.fill_(-1.0)  # revived: it goes on where it rested
    mine(x)
    assert not torch.equal(mine.running_mean[PRUNED], mean[PRUNED])


def test_evaluation_moves_nothing() -> None:
    source, norm, x = pair("conv")
    mine = gated(norm, source).eval()
    before = {name: value.clone() for name, value in mine.state_dict().items()}
    mine(x)
    assert all(torch.equal(value, before[name]) for name, value in mine.state_dict().items())


def test_normalise_writes_nothing() -> None:
    _, norm, x = pair("conv")
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    y, mean, variance = normalise(norm, x)
    assert all(torch.equal(value, before[name]) for name, value in norm.state_dict().items())
    assert not mean.requires_grad
    assert not variance.requires_grad
    torch.testing.assert_close(y, norm(x), **EXACT)
    torch.testing.assert_close(mean, norm.running_mean, **EXACT)
    torch.testing.assert_close(variance, norm.running_var, **EXACT)


def test_the_source_is_followed_but_not_owned() -> None:
    source, norm, _ = pair("conv")
    mine: GatedBatchNorm = gated(norm, source)
    assert sorted(mine.state_dict()) == sorted(norm.state_dict())
    assert mine.weight is norm.weight
    assert not list(mine.children())
    model = nn.Sequential(source, mine)
    twin = copy.deepcopy(model)
    assert twin[1].source is twin[0]  # type: ignore[union-attr]
    assert twin[1].source is not source  # type: ignore[union-attr]


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}])
def test_a_norm_that_devices_cannot_train(options: dict[str, object]) -> None:
    norm = nn.BatchNorm2d(5, **options)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="needs momentum and running statistics"):
        normalise(norm, torch.randn(3, 5, 2, 2))
