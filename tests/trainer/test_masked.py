"""Masks in forward and backward, against values worked out by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.masked import MaskedConv2d, MaskedLinear, straight_through

EXACT = {"rtol": 1e-12, "atol": 1e-14}
"""float64: sums of a few terms in another order."""

DISTANCES = [-2.0, -0.5, 0.0, 1e-30, 0.5, 1.0, 2.0]


def conv(**options) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(3, 6, 3, **options).double()


def masked_conv(gate: bool = True, ste: str = "identity", scale: float = 1.0, **options) -> MaskedConv2d:
    layer = MaskedConv2d(conv(**options), ste=ste, scale=scale, gate=gate)  # type: ignore[arg-type]
    score = layer.weight.detach().abs().mean((1, 2, 3)) / scale
    layer.threshold.data = score + torch.tensor([-0.01, 0.01, -0.02, 0.02, 0.03, -0.03], dtype=score.dtype)
    return layer


def test_the_mask_is_0_at_the_threshold() -> None:
    hard = straight_through(torch.tensor(DISTANCES), "identity")
    assert hard.tolist() == [0, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("ste", "gradient"),
    [("identity", [1.0] * 7), ("cifar-release", [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])],
)
def test_the_surrogates_gradient(ste: str, gradient: list[float]) -> None:
    distance = torch.tensor(DISTANCES, requires_grad=True)
    hard = straight_through(distance, ste)  # type: ignore[arg-type]
    assert hard.tolist() == [0, 0, 0, 1, 1, 1, 1]
    (got,) = torch.autograd.grad(hard.sum(), distance)
    assert got.tolist() == gradient


@pytest.mark.parametrize("infinite", [float("inf"), float("-inf")])
def test_no_threshold_makes_a_mask_that_is_no_number(infinite: float) -> None:
    """inf - inf is NaN: a threshold that ran away would poison the weights of a layer that is only pruned."""
    layer = masked_conv()
    layer.threshold.data[0] = infinite
    assert layer.active()[0] == (infinite < 0)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_scores_are_mean_magnitudes_in_units_of_the_scale(scale: float) -> None:
    layer = masked_conv(scale=scale)
    expected = torch.stack([row.abs().mean() / scale for row in layer.weight]) - layer.threshold
    torch.testing.assert_close(layer.distance(), expected, **EXACT)
    assert layer.active().tolist() == [1, 0, 1, 0, 0, 1]
    assert not layer.active().requires_grad


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("gate", [True, False])
def test_gradients_by_hand(gate: bool, scale: float) -> None:
    layer = masked_conv(gate=gate, scale=scale, bias=False)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    target = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    by_weight, by_threshold = torch.autograd.grad((layer(x) * target).sum(), [layer.weight, layer.threshold])
    plain = layer.weight.detach().requires_grad_()
    (unmasked,) = torch.autograd.grad((F.conv2d(x, plain) * target).sum(), plain)
    mask = layer.active().view(-1, 1, 1, 1)
    # d(sum) / d mask_i = sum_j G_ij W_ij, and d mask / d(score - tau) = 1 (times the mask where it gates)
    by_mask = (unmasked * plain.detach()).sum((1, 2, 3)) * (layer.active() if gate else 1.0)
    expected = unmasked * mask + (by_mask / (27 * scale)).view(-1, 1, 1, 1) * plain.detach().sign()
    torch.testing.assert_close(by_threshold, -by_mask, **EXACT)
    torch.testing.assert_close(by_weight, expected, **EXACT)
    pruned = layer.active() == 0
    assert bool(by_threshold[pruned].any()) == (not gate)
    assert bool(by_weight[pruned].any()) == (not gate)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_the_gate_is_a_product_with_the_output(kind: str, bias: bool) -> None:
    """The gate sits on weight and bias because it is cheaper there; value and every gradient are the output's."""
    torch.manual_seed(2)
    ordinary = nn.Conv2d(3, 6, 3, bias=bias) if kind == "conv" else nn.Linear(7, 6, bias=bias)
    x = torch.randn(4, *((3, 5, 5) if kind == "conv" else (7,)), dtype=torch.float64, requires_grad=True)
    gradients = []
    for gate in (True, False):
        cls = MaskedConv2d if kind == "conv" else MaskedLinear
        layer = cls(ordinary.double(), gate=gate)  # type: ignore[arg-type]
        score = layer.weight.detach().abs().flatten(1).mean(1)
        layer.threshold.data = score + torch.tensor(
            [-0.01, 0.01, -0.02, 0.02, 0.03, -0.03], dtype=score.dtype
        )
        y = layer(x)
        if not gate:
            y = y * layer.active().view(-1, *[1] * (y.dim() - 2))
        loss = (torch.sin(y) * torch.arange(y[0].numel(), dtype=y.dtype).view(y[0].shape)).sum()
        gradients.append([y.detach(), *torch.autograd.grad(loss, [x, *layer.parameters()])])
    assert len(gradients[0]) == 4 + bias
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, **EXACT)
    assert (gradients[0][0] == 0).any()


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_masks_its_output_as_it_would_its_weight(gate: bool, bias: bool) -> None:
    """Of a batch the output is masked, of sequences the weight: the same numbers, and the same gradients."""
    torch.manual_seed(1)
    layer = MaskedLinear(nn.Linear(7, 6, bias=bias).double(), gate=gate)
    layer.threshold.data = layer.weight.detach().abs().mean(1) + torch.tensor([-1.0, 1.0] * 3).double() / 50
    x, factor = torch.randn(5, 7).double(), torch.randn(5, 6).double()
    found = []
    for shape in ((5, 7), (1, 5, 7)):
        y = layer(x.reshape(shape)).reshape(5, 6)
        found.append([y, *torch.autograd.grad((y * factor).sum(), list(layer.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **EXACT)
        assert one.abs().max() > 0


def test_a_pruned_channel_is_exactly_0_bias_and_all() -> None:
    layer = masked_conv(padding=1)
    y = layer(torch.randn(2, 3, 5, 5, dtype=torch.float64))
    pruned = layer.active() == 0
    assert (y[:, pruned] == 0).all()
    assert (y[:, ~pruned] != 0).all()
    bare = masked_conv(gate=False, padding=1)
    y = bare(torch.randn(2, 3, 5, 5, dtype=torch.float64))
    assert bare.bias is not None
    assert torch.equal(y[:, pruned], bare.bias[pruned].view(1, -1, 1, 1).expand(2, -1, 5, 5))


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2, "padding": 1},
        {"dilation": 2, "bias": False},
        {"groups": 3},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": "same"},
    ],
)
def test_a_masked_convolution_keeps_all_options_of_the_one_it_was(options: dict[str, object]) -> None:
    ordinary = conv(**options)
    masked = MaskedConv2d(ordinary)
    masked.threshold.data.fill_(-1.0)
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    assert torch.equal(masked(x), ordinary(x))
    assert masked.weight is ordinary.weight
    assert masked.bias is ordinary.bias


def test_the_mode_is_the_layers() -> None:
    assert not MaskedLinear(nn.Linear(3, 2).eval()).training
    assert MaskedLinear(nn.Linear(3, 2)).training


def test_state_names_are_the_layers_and_a_threshold() -> None:
    layer: nn.Module = MaskedLinear(nn.Linear(3, 2))
    assert sorted(layer.state_dict()) == ["bias", "threshold", "weight"]
    assert all(
        isinstance(value, Tensor) and value.dtype == torch.float32 for value in layer.state_dict().values()
    )
