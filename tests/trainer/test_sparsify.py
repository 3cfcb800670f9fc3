"""Ordinary models made sparse: what is exchanged, what stays, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spafl.errors import SettingsError
from trainer.graph import token_ids
from trainer.masked import MaskedConv1d, MaskedConv2d, MaskedLinear
from trainer.models import Conv4, LeNet5
from trainer.norm import GatedBatchNorm1d, GatedBatchNorm2d
from trainer.sparsify import layout_of, masked_layers, sparsify


class Net(nn.Module):
    """Norms of all sorts: behind a layer alone, beside another reader, behind an activation, and on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm0 = nn.BatchNorm2d(2)
        self.conv1, self.norm1 = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
        self.conv3, self.norm3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.fc, self.norm4 = nn.Linear(16, 6), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(self.norm0(x))))
        x = self.conv2(x)
        x = x + self.norm2(x)
        x = self.norm3(F.relu(self.conv3(x)))
        return self.head(self.norm4(self.fc(x.flatten(1))))


def test_only_the_layers_are_exchanged() -> None:
    torch.manual_seed(0)
    model = Net()
    before = copy.deepcopy(model.state_dict())
    sparse = sparsify(model)
    assert type(sparse) is Net
    assert sparse is not model
    kinds = {name: type(module) for name, module in sparse.named_modules() if name}
    assert kinds == {
        "norm0": nn.BatchNorm2d,
        "conv1": MaskedConv2d,
        "norm1": GatedBatchNorm2d,
        "conv2": MaskedConv2d,
        "norm2": nn.BatchNorm2d,  # not the only reader
        "conv3": MaskedConv2d,
        "norm3": nn.BatchNorm2d,  # not the first reader
        "fc": MaskedLinear,
        "norm4": GatedBatchNorm1d,
        "head": nn.Linear,
    }
    # the gate sits in exactly one place: the norm that alone reads the layer, else the layer
    assert {name: layer.gate for name, layer in masked_layers(sparse).items()} == {
        "conv1": False,
        "conv2": True,
        "conv3": True,
        "fc": False,
    }
    after = sparse.state_dict()
    assert list(model.state_dict()) == list(before)
    assert {name for name in after if not name.endswith(".threshold")} == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(not value.any() for name, value in after.items() if name.endswith(".threshold"))


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_with_every_filter_active_nothing_changes(gate: bool, training: bool) -> None:
    torch.manual_seed(0)
    model = Net().double().train(training)
    sparse = sparsify(model, gate=gate, mask_head=True)
    assert sparse.training == training
    x = torch.randn(5, 2, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-10, atol=1e-12)


def test_without_the_gate_norms_are_left_alone() -> None:
    sparse = sparsify(Net(), gate=False)
    assert type(sparse.norm1) is nn.BatchNorm2d
    assert not any(layer.gate for layer in masked_layers(sparse).values())


@pytest.mark.parametrize("mask_head", [False, True])
def test_the_head_is_exempt_unless_asked_for(mask_head: bool) -> None:
    sparse = sparsify(Net(), mask_head=mask_head)
    assert isinstance(sparse.head, MaskedLinear) == mask_head
    assert [layer.name for layer in layout_of(sparse).layers] == [
        "conv1",
        "conv2",
        "conv3",
        "fc",
        *["head"] * mask_head,
    ]


class TwoHeads(nn.Module):
    """The output is a sum of two layers; one of them reads the other way round from a layer that is called later."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.first = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return F.log_softmax(self.left(x) + self.right(x).relu(), 1)


def test_every_layer_that_reaches_the_output_unmasked_is_a_head() -> None:
    assert list(masked_layers(sparsify(TwoHeads()))) == ["first"]
    sparse = sparsify(TwoHeads(), mask_head=True)
    # the layout follows the calls, not the order of construction
    assert [layer.name for layer in layout_of(sparse).layers] == ["first", "left", "right"]


def test_options_reach_the_layers() -> None:
    torch.manual_seed(0)
    model = Net()
    sparse = sparsify(model, ste="cifar-release", scale="layer")
    assert {layer.ste for layer in masked_layers(sparse).values()} == {"cifar-release"}
    mean = model.conv1.weight.abs().mean().item()
    assert sparse.conv1.scale == pytest.approx(mean, rel=1e-5)
    assert layout_of(sparse).layers[0].scale == sparse.conv1.scale


@pytest.mark.parametrize(("mask_head", "size"), [(True, 580), (False, 570)])
def test_lenet5s_layout(mask_head: bool, size: int) -> None:
    layout = layout_of(sparsify(LeNet5(), mask_head=mask_head))
    assert layout.size == size
    rows = [(layer.name, layer.kind, layer.out, layer.n_in, layer.n_scale) for layer in layout.layers]
    assert rows == [
        ("conv1", "conv", 20, 25, 25),
        ("conv2", "conv", 50, 500, 25),
        ("fc1", "linear", 500, 800, 800),
        *[("fc2", "linear", 10, 500, 500)] * mask_head,
    ]
    assert [layer.offset for layer in layout.layers] == [0, 20, 70, *[570] * mask_head]


def test_conv4s_layout_and_its_divisors() -> None:
    sparse = sparsify(Conv4())
    layout = layout_of(sparse)
    assert layout.size == 64 + 64 + 128 + 128 + 128 + 128
    assert [layer.n_in for layer in layout.layers] == [75, 1600, 1600, 3200, 512, 128]
    assert [layer.n_scale for layer in layout.layers] == [25, 25, 25, 25, 512, 128]
    by_inputs = layout_of(sparse, "n_in")
    assert [layer.n_scale for layer in by_inputs.layers] == [layer.n_in for layer in layout.layers]
    assert by_inputs.id != layout.id
    assert layout_of(sparsify(Conv4())).id == layout.id  # weights are no part of it
    assert all(not masked.gate for masked in masked_layers(sparse).values())


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(F.relu(self.layer(x))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.other(F.relu(self.one(x))))


class Branching(Shared):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x) if x.sum() > 0 else x)


class Looping(Shared):
    def forward(self, x: Tensor) -> Tensor:
        for row in x:
            x = x + row
        return self.head(self.layer(x))


class Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.head(x))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Shared(), "module 'layer' is called more than once: give each call its own layer"),
        (Tied(), "one.weight and other.weight are one tensor"),
        (Branching(), "Branching cannot be traced: .* must not branch on tensor values or sizes"),
        (Looping(), "Looping cannot be traced"),
        (Headless(), "beside its head; mask_head=True masks that as well"),
        (nn.Sequential(nn.Flatten(), nn.ReLU()), "Sequential has no Conv1d, Conv2d or Linear to mask"),
        (
            nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=None), nn.ReLU(), nn.Linear(4, 2)),
            "batch norm '1' needs momentum and running statistics",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refused_with_the_reason(model: nn.Module, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        sparsify(model)


def test_a_layout_needs_masks() -> None:
    with pytest.raises(SettingsError, match=r"sparsify\(\) it first"):
        layout_of(LeNet5())


class Windows(nn.Module):
    """Token ids to 1-D convolutions: what is masked, what only trained, and a layer of a class of one's own."""

    class Own(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(20, 4), nn.Parameter(torch.zeros(1, 8, 4))
        self.conv, self.norm = nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.depthwise, self.own = nn.Conv1d(6, 6, 3, groups=6, bias=False), self.Own(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:  # (N, 8)
        x = (self.embed(x.long()) + self.position).transpose(1, 2)
        x = F.relu(self.depthwise(F.relu(self.norm(self.conv(x)))))
        return self.head(self.own(x.mean(2)))


def test_1d_convolutions_are_masked_and_gated_by_their_norm() -> None:
    sparse = sparsify(Windows())
    assert {name: type(layer) for name, layer in masked_layers(sparse).items()} == {
        "conv": MaskedConv1d,
        "depthwise": MaskedConv1d,
    }
    assert type(sparse.norm) is GatedBatchNorm1d
    assert (sparse.conv.gate, sparse.depthwise.gate) == (False, True)
    assert (type(sparse.embed), type(sparse.own)) == (nn.Embedding, Windows.Own)
    layers = layout_of(sparse).layers
    assert [(layer.kind, layer.out, layer.n_in, layer.n_scale) for layer in layers] == [
        ("conv", 6, 12, 3),
        ("conv", 6, 3, 3),
    ]


def test_a_pruned_1d_filter_is_silent() -> None:
    torch.manual_seed(0)
    sparse = sparsify(Windows())
    sparse.conv.threshold.data[2] = sparse.depthwise.threshold.data[4] = 9.0
    seen: dict[str, Tensor] = {}
    for name in ("norm", "depthwise"):
        sparse.get_submodule(name).register_forward_hook(
            lambda module, given, value, name=name: seen.update({name: value})
        )
    sparse(torch.randint(0, 20, (5, 8)).float()).sum().backward()
    assert not seen["norm"][:, 2].any()
    assert not seen["depthwise"][:, 4].any()
    assert seen["norm"].abs().sum((0, 2)).count_nonzero() == 5
    assert not sparse.conv.weight.grad[2].any()
    assert not sparse.conv.bias.grad[2]


@pytest.mark.parametrize("tokens", [5, 6])
def test_a_batch_norm_of_positions_is_no_gate(tokens: int) -> None:
    """Its channels are the second axis, whatever its size is; the filters are on the last."""

    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(tokens), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm(self.fc(x)).mean(1))

    x = torch.randn(3, tokens, 4)
    with pytest.raises(
        SettingsError, match=r"batch norm 'norm' takes \(3, ., 6\) from a linear layer.*LayerNorm"
    ):
        sparsify(Sequence())(x)
    sparsify(Sequence(), gate=False)(x)  # nothing follows the mask there


class Lookup(nn.Module):
    def __init__(self, *, ids: bool) -> None:
        super().__init__()
        self.embed, self.head, self.ids = nn.Embedding(20, 4), nn.Linear(4, 2), ids

    def forward(self, x: Tensor) -> Tensor:  # (N, 8)
        if self.ids:
            return self.head(self.embed(x[:, 1:].long().contiguous()).mean(1))
        return self.head(self.embed(torch.arange(8)).sum(0) * x.sum(1, keepdim=True))


def test_token_ids_are_what_an_embedding_looks_up() -> None:
    assert token_ids(Lookup(ids=True)) == 20
    assert token_ids(sparsify(Windows())) == 20
    assert token_ids(Lookup(ids=False)) is None, "positions are looked up, the input is not"
    assert token_ids(LeNet5()) is None
