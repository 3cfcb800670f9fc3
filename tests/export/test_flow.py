"""What is declared droppable or exact, and why not, on models small enough to see it."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.build import compaction_of
from export.channels import Group
from export.compact import CompactModel
from export.flow import ChannelFlows, pads
from spafl.rows import kept_rows
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


def flows(model: nn.Module, shape: tuple[int, ...] = SHAPE, **options) -> dict[str, Group]:
    by_layer = ChannelFlows(sparsify(model, **options), shape).by_layer
    return {name.removeprefix("layers."): group for name, group in by_layer.items()}


def live(group: Group) -> set[str]:
    """Which channels stay, as text: layers whose filters must all be active joined by &."""
    return {"&".join(sorted(name.removeprefix("layers.") for name in layers)) for layers in group.live}


def assert_compact_is_masked(
    model: nn.Module, shape: tuple[int, ...] = SHAPE, **options: object
) -> dict[str, int]:
    """Half of the filters pruned, others in each layer; what is droppable dropped, in float64. Returns what is kept."""
    torch.manual_seed(1)
    model = sparsify(model, **options)  # type: ignore[arg-type]
    draw = torch.Generator().manual_seed(2)
    for layer in masked_layers(model).values():
        layer.threshold.data[torch.randperm(len(layer.weight), generator=draw)[::2]] = 9.0
    compact = CompactModel(model, shape, dropped=lambda group: group.drops)
    compact.model.double()
    model.double().eval()
    active = {name: layer.active().numpy() > 0 for name, layer in masked_layers(model).items()}
    kept = kept_rows(compaction_of(compact), active)
    compact.active = {name: torch.from_numpy(kept[name]) for name in compact.dropped}
    x = torch.randn(3, *shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compact.run(model.state_dict(), x), model(x), rtol=0, atol=SUM)
    return {name.removeprefix("layers."): len(rows) for name, rows in kept.items()}


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x + 1,
        lambda x: 1 / (F.relu(x) + 2),
        lambda x: 3 - x * 2,
        lambda x: (x * torch.sigmoid(x)) + x,
    ],
)
@pytest.mark.parametrize("gate", [True, False])
def test_arithmetic_makes_constants(between: Callable[[Tensor], Tensor], gate: bool) -> None:
    model = Two(between, padding=1)
    assert flows(model, gate=gate)["conv1"].drops
    assert assert_compact_is_masked(model, gate=gate)["conv1"] == 2


@pytest.mark.parametrize("norm", [False, True])
def test_a_gated_channel_is_exactly_nothing(norm: bool) -> None:
    flow = flows(Two(F.gelu, norm=norm))["conv1"]
    assert (flow.drops, flow.exact, flow.norms) == (True, True, {"norm": "conv1"} if norm else {})
    assert flow.readers == ["conv2"]


@pytest.mark.parametrize("gate", [True, False])
def test_a_sigmoid_makes_a_constant_of_zero(gate: bool) -> None:
    model = Two(torch.sigmoid, padding=1)
    flow = flows(model, gate=gate)["conv1"]
    assert (flow.drops, flow.exact) == (True, False)
    assert pads(model.conv2)
    assert_compact_is_masked(model, gate=gate)


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
    assert (flow.drops, flow.exact, flow.norms) == (True, False, {"norm": "conv1"})


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
        (lambda x: x[:, :, :4, :4].transpose(1, 2), "axis 2"),
        (lambda x: x.flip(1), "flip"),
        (lambda x: x.mT, "getattr"),
        (lambda x: x.data, "getattr"),
        (lambda x: F.relu(x) / x.shape[1], "truediv"),
        (lambda x: torch.softmax(x, 1), "softmax"),
        (lambda x: F.local_response_norm(x, 2), "local_response_norm"),
        (nn.GroupNorm(2, 4), "between"),
        (nn.ChannelShuffle(2), "between"),
        (nn.Softmax(1), "between"),
        (lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), "chunk makes more than one value"),
        (lambda x: F.relu(x) / (x + 1), "divides by channels that may be pruned"),
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
    assert flow.exact
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
    assert flow.exact
    assert_compact_is_masked(model)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.view(-1, 64),
        lambda x: torch.reshape(x, (-1, 64)),
        lambda x: x.view(x.size(0), 64),
        lambda x: x.reshape(x.shape[0], x.shape[1] * 16),
    ],
)
def test_a_view_that_names_its_size_takes_as_many_as_there_are(view: Callable[[Tensor], Tensor]) -> None:
    """As it is written, view(-1, 64) would make one example of two with half the channels gone."""
    model = Function(
        lambda layers, x: layers.head(view(F.relu(layers.conv(x)))),
        conv=nn.Conv2d(2, 4, 3),
        head=nn.Linear(64, 3),
    )
    assert flows(model)["conv"].exact
    assert assert_compact_is_masked(model) == {"conv": 2}


def test_a_view_with_two_unknown_sizes_keeps_all_channels() -> None:
    model = Function(
        lambda layers, x: layers.head(F.relu(layers.conv(x)).view(2, -1, 4, 16).flatten(0, 1).flatten(1)),
        conv=nn.Conv2d(2, 4, 3),
        head=nn.Linear(64, 3),
    )
    assert not flows(model)["conv"].drops


def test_a_number_of_channels_that_is_used_keeps_them() -> None:
    def forward(layers: SimpleNamespace, x: Tensor) -> Tensor:
        x = F.relu(layers.conv(x))
        return layers.head(x.flatten(1) * x.shape[1])

    model = Function(forward, conv=nn.Conv2d(2, 4, 3), head=nn.Linear(64, 3))
    assert "mul depends on the number of channels" in str(flows(model)["conv"].refusal)
    assert_compact_is_masked(model)


def test_channels_last_is_not_lined_up() -> None:
    model = Function(
        lambda layers, x: layers.head(layers.conv(x).permute(0, 2, 3, 1).flatten(1)),
        conv=nn.Conv2d(2, 4, 3),
        head=nn.Linear(64, 3),
    )
    assert "flatten mixes or moves channels" in str(flows(model)["conv"].refusal)


def test_blocks_of_a_grouped_convolution_keep_equally_many() -> None:
    model = Two(F.relu, groups=2)
    found = flows(model)
    assert [(found[name].drops, found[name].exact, found[name].blocks) for name in ("conv1", "conv2")] == [
        (True, False, 2)
    ] * 2
    assert assert_compact_is_masked(model)["conv1"] % 2 == 0


def test_a_grouped_convolution_may_pad_zeros_only() -> None:
    assert flows(Two(F.relu, groups=2, padding=1))["conv1"].drops
    model = Two(torch.sigmoid, groups=2, padding=1)
    assert flows(model)["conv1"].refusal == "conv2: a grouped convolution pads what is not zero"
    assert_compact_is_masked(model)
    unpadded = Two(torch.sigmoid, groups=2)
    assert flows(unpadded)["conv1"].drops
    assert_compact_is_masked(unpadded)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("activation", [F.relu, torch.sigmoid])
def test_a_depthwise_convolution_joins_what_it_reads_and_makes(
    activation: Callable[[Tensor], Tensor], gate: bool, padding: int
) -> None:
    model = Two(activation, groups=4, padding=padding)
    found = flows(model, gate=gate)
    silent = (gate and activation is F.relu) or padding == 0
    assert found["conv1"] is found["conv2"]
    # with silence before it, a channel is needed if both filters are active; else the border of a constant is not one
    assert live(found["conv1"]) == ({"conv1&conv2"} if silent else {"conv1", "conv2"})
    assert not found["conv1"].exact
    kept = assert_compact_is_masked(model, gate=gate)
    assert kept["conv1"] == kept["conv2"]


def test_a_depthwise_convolution_beside_another_reader() -> None:
    def forward(layers: SimpleNamespace, x: Tensor) -> Tensor:
        x = F.relu(layers.stem(x))
        return layers.head((layers.depthwise(x) * 2 + layers.other(x)).mean((2, 3)))

    model = Function(
        forward,
        stem=nn.Conv2d(2, 4, 3),
        depthwise=nn.Conv2d(4, 4, 3, groups=4, padding=1),
        other=nn.Conv2d(4, 4, 1),
        head=nn.Linear(4, 3),
    )
    found = flows(model)
    assert live(found["stem"]) == {"stem", "other"}
    assert_compact_is_masked(model)


def test_a_depthwise_convolution_that_makes_two_of_each_keeps_all() -> None:
    model = Two(F.relu, groups=4)
    model.conv2, model.head = nn.Conv2d(4, 8, 3, groups=4), nn.Linear(8, 3)
    assert flows(model)["conv1"].refusal == "conv2: a depthwise convolution makes 2 channels of each"
    assert_compact_is_masked(model)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_that_is_not_zero_repeats_constants(mode: str) -> None:
    model = Two(torch.sigmoid, padding=1, padding_mode=mode)
    assert flows(model)["conv1"].drops
    assert not pads(model.conv2)
    assert_compact_is_masked(model)


@pytest.mark.parametrize("padding", ["same", (1, 0), "valid"])
def test_padding_in_all_its_spellings(padding: object) -> None:
    model = Two(torch.sigmoid, padding=padding)
    assert pads(model.conv2) == (padding != "valid")
    assert flows(model)["conv1"].drops
    assert_compact_is_masked(model)


def test_a_linear_layer_on_sequences_has_its_filters_on_the_last_axis() -> None:
    model = Function(
        lambda layers, x: layers.head(F.gelu(layers.first(x)).mean((1, 2))),
        first=nn.Linear(6, 5),
        head=nn.Linear(5, 3),
    )
    assert flows(model)["first"].exact
    assert assert_compact_is_masked(model) == {"first": 2}


def test_a_linear_layer_across_channels_keeps_them() -> None:
    model = Function(
        lambda layers, x: layers.head(layers.along(layers.conv(x)).flatten(1)),
        conv=nn.Conv2d(2, 4, 3),
        along=nn.Linear(4, 5),
        head=nn.Linear(80, 3),
    )
    assert "whose channels are on axis 1" in str(flows(model)["conv"].refusal)
    assert_compact_is_masked(model)


def test_a_sum_joins_channels() -> None:
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
    assert found["stem"] is found["outer"]
    assert (found["stem"].name, found["stem"].layers) == ("layers.stem", ["layers.stem", "layers.outer"])
    assert live(found["stem"]) == {"stem", "outer"}
    assert (found["stem"].exact, found["inner"].exact) == (True, True)
    assert_compact_is_masked(model)
    assert_compact_is_masked(model, gate=False)


def test_a_sum_with_what_is_not_pruned_keeps_all() -> None:
    model = Function(
        lambda layers, x: layers.head((layers.conv(x) + x[:, :1]).flatten(1)),
        conv=nn.Conv2d(2, 6, 3, padding=1),
        head=nn.Linear(6 * 36, 3),
    )
    assert flows(model)["conv"].refusal == "add: what it is joined with is not pruned"
    assert_compact_is_masked(model)


def test_a_product_with_zero_is_not_needed() -> None:
    """Squeeze and excitation: where the channel is 0, so is its product with whatever the gate says."""

    def forward(layers: SimpleNamespace, x: Tensor) -> Tensor:
        x = F.relu(layers.conv(x))
        gates = torch.sigmoid(layers.excite(F.relu(layers.squeeze(x.mean((2, 3))))))
        return layers.head((x * gates.unsqueeze(-1).unsqueeze(-1)).flatten(1))

    model = Function(
        forward,
        conv=nn.Conv2d(2, 6, 3),
        squeeze=nn.Linear(6, 3),
        excite=nn.Linear(3, 6),
        head=nn.Linear(6 * 16, 3),
    )
    found = flows(model)
    assert live(found["excite"]) == {"conv"}
    assert found["conv"].exact
    assert_compact_is_masked(model)
    assert live(flows(model, gate=False)["excite"]) == {"conv", "excite"}
    assert_compact_is_masked(model, gate=False)


@pytest.mark.parametrize("gate", [True, False])
def test_a_concatenation_lines_channels_up(gate: bool) -> None:
    """As DenseNets have it: a norm over what several layers make, the input among it."""

    def forward(layers: SimpleNamespace, x: Tensor) -> Tensor:
        y = layers.one(x)
        y = torch.cat([x, y, layers.two(F.gelu(layers.norm(y)))], 1)
        return layers.head(F.relu(layers.last(F.gelu(layers.wide(y)))).flatten(1))

    model = Function(
        forward,
        one=nn.Conv2d(2, 4, 3, padding=1),
        norm=nn.BatchNorm2d(4),
        two=nn.Conv2d(4, 5, 3, padding=1),
        wide=nn.BatchNorm2d(11),
        last=nn.Conv2d(11, 4, 3, padding=1),
        head=nn.Linear(4 * 36, 3),
    )
    for norm in (model.layers["norm"], model.layers["wide"]):
        norm.running_mean += torch.linspace(-1, 1, len(norm.weight))
        norm.bias.data += 0.3
    found = flows(model, gate=gate)
    assert all(found[name].drops for name in ("one", "two", "last"))
    assert not found["two"].exact
    assert assert_compact_is_masked(model, gate=gate) == {"one": 2, "two": 2, "last": 2}


class Attention(nn.Module):
    """Attention of two heads over the rows of an image, and a layer that reads it."""

    def __init__(self, kind: str, bias: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.query, self.key, self.value = (nn.Linear(6, 8, bias=bias) for _ in range(3))
        self.out, self.head = nn.Linear(8, 5), nn.Linear(5, 3)

    def split(self, x: Tensor) -> Tensor:
        if self.kind == "views":
            batch, tokens, width = x.shape
            return x.view(batch, tokens, 2, width // 2).transpose(1, 2)
        return x.unflatten(2, (2, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0]
        query, key, value = (self.split(layer(x)) for layer in (self.query, self.key, self.value))
        if self.kind == "products":
            y = torch.softmax(query @ key.transpose(-2, -1) * 0.5, -1) @ value
        else:
            y = F.scaled_dot_product_attention(query, key, value)
        y = y.transpose(1, 2)
        y = y.reshape(y.shape[0], y.shape[1], 8) if self.kind == "views" else y.flatten(2)
        return self.head(F.relu(self.out(y)).mean(1))


@pytest.mark.parametrize("kind", ["unflatten", "views", "products"])
def test_attention_needs_a_channel_of_query_and_key_only_if_both_are_there(kind: str) -> None:
    model = Attention(kind)
    found = flows(model)
    assert found["query"] is found["key"]
    assert live(found["query"]) == {"key&query"}
    assert [found[name].blocks for name in ("query", "value", "out")] == [2, 2, 1]
    assert all(group.exact for group in found.values())
    kept = assert_compact_is_masked(model)
    assert kept["query"] == kept["key"] < 8
    assert kept["value"] % 2 == 0


def test_attention_without_a_gate_multiplies_biases() -> None:
    model = Attention("unflatten", bias=True)
    found = flows(model, gate=False)
    assert "multiplies channels that are not zero" in str(found["query"].refusal)
    assert found["value"].drops  # a mean of constants is a constant
    assert_compact_is_masked(model, gate=False)


def test_what_a_layer_norm_reads_stays() -> None:
    model = Function(
        lambda layers, x: layers.head(layers.norm(layers.first(x)).mean((1, 2))),
        first=nn.Linear(6, 5),
        norm=nn.LayerNorm(5),
        head=nn.Linear(5, 3),
    )
    assert flows(model)["first"].refusal == "layers.norm normalises over channels"
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
    assert flow.readers == ["layers.left", "layers.right"]
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
    assert {name: found.channels[node].single for name, node in found.sources.items()} == {
        "conv2": found.by_layer["conv1"],
        "head": found.by_layer["conv2"],
    }
