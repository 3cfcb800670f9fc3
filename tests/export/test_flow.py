"""What is declared droppable or exact, and why not, on models small enough to see it."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.compact import CompactModel
from export.flow import ChannelFlows, Flow
from trainer.sparsify import masked_layers, sparsify

SHAPE = (2, 6, 6)
SUM = 1e-12
"""Absolute, of float64 logits around 1: sums of under a hundred terms in another order."""


class Two(nn.Module):
    """Two convolutions with `between` in between, and a head."""

    def __init__(self, between: Callable[[Tensor], Tensor] | nn.Module, norm: bool = False, **second) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.between = between
        self.conv2 = nn.Conv2d(4, 4, 3, **second)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv2(self.between(self.norm(self.conv1(x)))).mean((2, 3)))


class Function(nn.Module):
    """A model whose forward is `function(layers, x)`."""

    def __init__(self, function: Callable[[SimpleNamespace, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(SimpleNamespace(**self.layers), x)


def flows(model: nn.Module, shape: tuple[int, ...] = SHAPE, **options) -> dict[str, Flow]:
    by_layer = ChannelFlows(sparsify(model, **options), shape).by_layer
    return {name.removeprefix("layers."): flow for name, flow in by_layer.items()}


def assert_compact_is_masked(model: nn.Module, shape: tuple[int, ...] = SHAPE) -> None:
    """Every second filter pruned; what is droppable dropped, in float64."""
    torch.manual_seed(1)
    model = sparsify(model)
    for layer in masked_layers(model).values():
        layer.threshold.data[::2] = 9.0
    compact = CompactModel(model, shape, dropped=lambda flow: flow.drops).for_inference()
    compact.model.double()
    model.double().eval()
    layers = masked_layers(model)
    compact.active = {name: layers[name].active().nonzero().flatten() for name in compact.dropped}
    x = torch.randn(3, *shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compact.run(model.state_dict(), x), model(x), rtol=0, atol=SUM)


@pytest.mark.parametrize("norm", [False, True])
def test_a_gated_channel_is_exactly_nothing(norm: bool) -> None:
    flow = flows(Two(F.gelu, norm=norm))["conv1"]
    assert (flow.drops, flow.exact, flow.norm) == (True, True, "norm" if norm else None)
    assert [(reader.name, reader.columns, reader.padded) for reader in flow.readers] == [("conv2", 1, False)]


@pytest.mark.parametrize("gate", [True, False])
def test_a_sigmoid_makes_a_constant_of_zero(gate: bool) -> None:
    flow = flows(Two(torch.sigmoid, padding=1), gate=gate)["conv1"]
    assert (flow.drops, flow.exact) == (True, False)
    assert flow.readers[0].padded


@pytest.mark.parametrize(
    ("bias", "activation", "exact"),
    [(False, F.relu, True), (True, F.relu, False), (False, F.gelu, False), (False, torch.tanh, False)],
)
def test_without_a_gate_only_relu_without_bias_is_silent(bias: bool, activation: object, exact: bool) -> None:
    model = Two(activation)  # type: ignore[arg-type]
    model.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=bias)
    flow = flows(model, gate=False)["conv1"]
    assert (flow.drops, flow.exact) == (True, exact)


def test_without_a_gate_a_norm_speaks() -> None:
    flow = flows(Two(F.relu, norm=True), gate=False)["conv1"]
    assert (flow.drops, flow.exact, flow.norm) == (True, False, "norm")


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: F.avg_pool2d(x, 3, 1, 1),
        lambda x: F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False),
        lambda x: F.avg_pool2d(x, 2, divisor_override=3),
        nn.AvgPool2d(3, 1, padding=1),
        nn.AvgPool2d(2, divisor_override=1),
    ],
)
def test_an_average_pool_that_changes_constants(pool: Callable[[Tensor], Tensor]) -> None:
    def between(x: Tensor) -> Tensor:
        return pool(torch.sigmoid(x))

    model = Two(between)
    if isinstance(pool, nn.Module):
        model.between = nn.Sequential(nn.Sigmoid(), pool)
    flow = flows(model)["conv1"]
    assert "average pool" in str(flow.refusal)
    zero = flows(Two(nn.Sequential(nn.ReLU(), pool) if isinstance(pool, nn.Module) else pool))["conv1"]
    assert (zero.drops, zero.exact) == (True, True)


@pytest.mark.parametrize(
    ("between", "names"),
    [
        (lambda x: x + 1, "add"),
        (lambda x: x.transpose(2, 3), "transpose"),
        (lambda x: x.flip(1), "flip"),
        (lambda x: x.mT, "getattr"),
        (lambda x: x.data, "getattr"),
        (lambda x: F.relu(x) / x.shape[1], "truediv"),
        (lambda x: torch.softmax(x, 1), "softmax"),
        (lambda x: F.local_response_norm(x, 2), "local_response_norm"),
        (nn.GroupNorm(2, 4), "between"),
        (nn.ChannelShuffle(2), "between"),
        (nn.Softmax(1), "between"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), "between_1"),
    ],
)
def test_what_moves_or_mixes_channels_is_named(between: Callable[[Tensor], Tensor], names: str) -> None:
    flow = flows(Two(between))["conv1"]
    assert not flow.exact
    assert names in str(flow.refusal)


def test_shapes_may_be_read_to_reshape() -> None:
    model = Function(
        lambda layers, x: layers.head(_viewed(F.relu(layers.conv(x)))),
        conv=nn.Conv2d(2, 4, 3),
        head=nn.Linear(64, 3),
    )
    flow = flows(model)["conv"]
    assert (flow.exact, flow.readers[0].columns) == (True, 16)
    assert_compact_is_masked(model)


def _viewed(x: Tensor) -> Tensor:
    return x.view(x.size(0), x.shape[1] * x.size(2) * x.size(3))


@pytest.mark.parametrize(
    "flatten",
    [
        nn.Flatten(),
        lambda x: torch.flatten(x, 1),
        lambda x: x.flatten(start_dim=1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape((x.shape[0], -1)),
        lambda x: torch.reshape(x, (x.size(0), -1)),
    ],
)
def test_a_flatten_lines_up_positions(flatten: Callable[[Tensor], Tensor]) -> None:
    layers = {"conv": nn.Conv2d(2, 4, 3), "head": nn.Linear(64, 3)}
    if isinstance(flatten, nn.Module):
        layers["flatten"] = flatten
    model = Function(
        lambda layers, x: layers.head(getattr(layers, "flatten", flatten)(F.relu(layers.conv(x)))), **layers
    )
    flow = flows(model)["conv"]
    assert (flow.exact, flow.readers[0].columns) == (True, 16)
    assert_compact_is_masked(model)


@pytest.mark.parametrize("view", [lambda x: x.view(-1, 64), lambda x: torch.reshape(x, (-1, 64))])
def test_a_view_that_fixes_its_size_keeps_all_channels(view: Callable[[Tensor], Tensor]) -> None:
    """With half the channels gone, view(-1, 64) would make one example of two, without a word."""
    model = Function(
        lambda layers, x: layers.head(view(F.relu(layers.conv(x)))),
        conv=nn.Conv2d(2, 4, 3),
        head=nn.Linear(64, 3),
    )
    flow = flows(model)["conv"]
    assert not flow.drops
    assert "fixes the number of values: write flatten(1)" in str(flow.refusal)
    assert_compact_is_masked(model)


def test_channels_last_is_not_lined_up() -> None:
    model = Function(
        lambda layers, x: layers.head(layers.conv(x).permute(0, 2, 3, 1).flatten(1)),
        conv=nn.Conv2d(2, 4, 3),
        head=nn.Linear(64, 3),
    )
    assert "permute mixes or moves channels" in str(flows(model)["conv"].refusal)


def test_a_grouped_convolution_keeps_its_own_filters_too() -> None:
    model = Two(F.relu)
    model.conv1 = nn.Conv2d(2, 4, 3, groups=2)
    assert "ties its filters to groups" in str(flows(model)["conv1"].refusal)
    assert_compact_is_masked(model)


@pytest.mark.parametrize("groups", [2, 4])
def test_a_grouped_reader_needs_all_channels(groups: int) -> None:
    flow = flows(Two(F.relu, groups=groups))["conv1"]
    assert flow.refusal == "conv2: a grouped convolution ties input channels to output channels"


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_that_is_not_zero(mode: str) -> None:
    model = Two(torch.sigmoid, padding=1, padding_mode=mode)
    assert flows(model)["conv1"].refusal == f"conv2: padding mode {mode!r}"
    assert_compact_is_masked(model)


@pytest.mark.parametrize("padding", ["same", (1, 0), "valid"])
def test_padding_in_all_its_spellings(padding: object) -> None:
    model = Two(torch.sigmoid, padding=padding)
    assert flows(model)["conv1"].readers[0].padded == (padding != "valid")
    assert_compact_is_masked(model)


def test_a_linear_layer_on_sequences_has_its_filters_elsewhere() -> None:
    model = Function(
        lambda layers, x: layers.head(F.relu(layers.first(x)).flatten(1)),
        first=nn.Linear(6, 5),
        head=nn.Linear(2 * 6 * 5, 3),
    )
    assert "filters on the last axis" in str(flows(model)["first"].refusal)
    assert_compact_is_masked(model)


def test_a_shortcut_holds_on_to_its_channels() -> None:
    def forward(layers: SimpleNamespace, x: Tensor) -> Tensor:
        x = F.relu(layers.stem(x))
        x = x + layers.outer(F.relu(layers.inner(x)))
        return layers.head(x.flatten(1))

    model = Function(
        forward,
        stem=nn.Conv2d(2, 4, 3, padding=1),
        inner=nn.Conv2d(4, 5, 3, padding=1),
        outer=nn.Conv2d(5, 4, 3, padding=1),
        head=nn.Linear(4 * 36, 3),
    )
    found = flows(model)
    assert {name: flow.exact for name, flow in found.items()} == {
        "stem": False,
        "inner": True,
        "outer": False,
    }
    assert found["stem"].refusal == found["outer"].refusal == "add mixes or moves channels"
    assert_compact_is_masked(model)


def _fork(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor]) -> Function:
    def forward(layers: SimpleNamespace, x: Tensor) -> Tensor:
        x = layers.stem(x)
        return layers.head((layers.left(one(x)) + layers.right(other(x))).flatten(1))

    return Function(
        forward,
        stem=nn.Conv2d(2, 4, 3),
        left=nn.Conv2d(4, 5, 3, padding=1),
        right=nn.Conv2d(4, 5, 1),
        head=nn.Linear(5 * 16, 3),
    )


def test_two_readers_that_see_different_constants() -> None:
    model = _fork(F.relu, torch.sigmoid)
    flow = flows(model)["stem"]
    assert (flow.drops, flow.exact) == (True, False)
    assert [(reader.name, reader.padded, len(reader.path)) for reader in flow.readers] == [
        ("layers.left", True, 1),
        ("layers.right", False, 1),
    ]
    assert_compact_is_masked(model)


def test_two_readers_one_of_which_cannot_do_without() -> None:
    flow = flows(_fork(F.relu, lambda x: x.flip(1)))["stem"]
    assert not flow.drops
    assert flow.refusal == "flip mixes or moves channels"


def test_without_a_gate_one_reader_without_relu_is_one_too_many() -> None:
    model = _fork(F.relu, torch.tanh)
    model.layers["stem"] = nn.Conv2d(2, 4, 3, bias=False)
    assert not flows(model, gate=False)["stem"].exact
    model = _fork(F.relu, lambda x: F.relu(F.max_pool2d(x, 3, 1, 1)))
    model.layers["stem"] = nn.Conv2d(2, 4, 3, bias=False)
    assert flows(model, gate=False)["stem"].exact


def test_the_output_and_the_unread() -> None:
    model = Function(
        lambda layers, x: (layers.aside(x), layers.head(x.flatten(1)))[1],
        aside=nn.Conv2d(2, 4, 3),
        head=nn.Linear(72, 3),
    )
    found = flows(model, mask_head=True)
    assert found["head"].refusal == "its output is the model's output"
    assert found["aside"].refusal == "no layer reads it"


def test_positions_and_sources() -> None:
    model = sparsify(Two(F.relu, stride=2))
    found = ChannelFlows(model, SHAPE)
    assert found.positions == {"conv1": 36, "conv2": 4, "head": 1}
    assert {name: flow.layer for name, (flow, _) in found.sources.items()} == {"conv2": "conv1"}
