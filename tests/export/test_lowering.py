"""Gradients written for ONNX against torch's own."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.compact import select_columns
from export.convolution import FEW_CHANNELS, convolution_backward
from export.decompositions import batch_norm_backward, embedding_backward
from export.errors import LoweringError
from export.host import run, session
from export.lowering import lower
from export.pooling import (
    adaptive_avg_pool2d_backward,
    adaptive_max_pool2d_backward,
    avg_pool2d,
    avg_pool2d_backward,
)
from trainer.masked import straight_through

EXACT = {"rtol": 1e-10, "atol": 1e-11}
"""float64: sums of a thousand terms in another order."""
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}

aten = torch.ops.aten


def doubles(*shape: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


CONVOLUTIONS = [
    # channels, out, (height, width), kernel, stride, padding, dilation
    (3, 4, (9, 9), (3, 3), (1, 1), (0, 0), (1, 1)),
    (3, 4, (9, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
    (3, 4, (5, 12), (5, 2), (1, 1), (2, 0), (1, 1)),
    (3, 4, (9, 9), (5, 5), (1, 1), (0, 0), (1, 1)),  # far fewer output rows than input rows: row by row
    (3, 4, (30, 8), (3, 3), (1, 1), (1, 1), (1, 1)),  # about as many: stacked
    (3, 4, (9, 10), (3, 3), (2, 2), (1, 1), (1, 1)),
    (3, 4, (10, 9), (3, 2), (3, 2), (0, 1), (1, 1)),
    (3, 4, (11, 10), (3, 3), (1, 1), (2, 2), (2, 2)),
    (3, 4, (11, 13), (3, 2), (2, 1), (1, 3), (2, 3)),
    (3, 4, (7, 7), (1, 1), (1, 1), (0, 0), (1, 1)),
    (3, 4, (8, 7), (1, 1), (2, 3), (0, 0), (1, 1)),
    (3, 4, (4, 4), (1, 1), (1, 1), (1, 1), (1, 1)),
    (1, 4, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1)),
    (1, 4, (9, 8), (3, 2), (2, 2), (1, 0), (1, 2)),
    (3, 1, (6, 6), (3, 3), (1, 1), (0, 0), (1, 1)),
    (3, 4, (3, 3), (3, 3), (1, 1), (0, 0), (1, 1)),
]


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("channels", "out", "size", "kernel", "stride", "padding", "dilation"), CONVOLUTIONS)
def test_convolution_backward(
    channels: int,
    out: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    wide: bool,
) -> None:
    channels += FEW_CHANNELS * wide
    x, weight = doubles(2, channels, *size), doubles(out, channels, *kernel, seed=1)
    y = F.conv2d(x, weight, None, stride, padding, dilation)
    grad = doubles(*y.shape, seed=2)
    options = ([out], stride, padding, dilation, False, [0, 0], 1)
    for mask in itertools.product([True, False], repeat=3):
        got = convolution_backward(grad, x, weight, *options, mask)
        expected = aten.convolution_backward(grad, x, weight, *options, list(mask))
        for mine, torchs, asked in zip(got, expected, mask, strict=True):
            if not asked:
                assert mine is None
                continue
            assert mine is not None
            torch.testing.assert_close(mine, torchs, **EXACT)


@pytest.mark.parametrize(("channels", "out", "groups"), [(6, 4, 2), (6, 6, 6), (4, 8, 4), (20, 20, 20)])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 1, 1, 1), (3, 2, 1, 1), (2, 3, 0, 1), (3, 1, 2, 2), (1, 1, 0, 1)],
)
def test_grouped_convolution_backward(
    channels: int, out: int, groups: int, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    x, weight = doubles(2, channels, 9, 8), doubles(out, channels // groups, kernel, kernel, seed=1)
    rest = ([stride] * 2, [padding] * 2, [dilation] * 2)
    grad = doubles(*F.conv2d(x, weight, None, *rest, groups).shape, seed=2)
    options = ([out], *rest, False, [0, 0], groups, [True, True, True])
    for mine, torchs in zip(
        convolution_backward(grad, x, weight, *options),
        aten.convolution_backward(grad, x, weight, *options),
        strict=True,
    ):
        assert mine is not None
        torch.testing.assert_close(mine, torchs, **EXACT)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [(3, 1, 1, 1), (1, 1, 0, 1), (1, 3, 0, 1), (4, 2, 3, 2), (5, 1, 0, 1)],
)
def test_1d_convolution_backward(
    wide: bool, groups: int, kernel: int, stride: int, padding: int, dilation: int
) -> None:
    channels = FEW_CHANNELS if wide else 4
    x, weight = doubles(2, channels, 13), doubles(8, channels // groups, kernel, seed=1)
    rest = ([stride], [padding], [dilation])
    grad = doubles(*F.conv1d(x, weight, None, *rest, groups).shape, seed=2)
    for mask in itertools.product([True, False], repeat=3):
        options = ([8], *rest, False, [0], groups, list(mask))
        for mine, torchs in zip(
            convolution_backward(grad, x, weight, *options),
            aten.convolution_backward(grad, x, weight, *options),
            strict=True,
        ):
            torch.testing.assert_close(mine, torchs, **EXACT)


def test_convolutions_of_other_kinds_are_refused() -> None:
    grad, x, weight = doubles(1, 2, 3, 3, 3), doubles(1, 2, 3, 3, 3), doubles(2, 2, 1, 1, 1)
    options = (None, [1] * 3, [0] * 3, [1] * 3, False, [0] * 3, 1, [True] * 3)
    with pytest.raises(LoweringError, match="use Conv1d or Conv2d"):
        convolution_backward(grad, x, weight, *options)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "divisor"),
    [
        ((2, 2), (), (0, 0), None),
        ((3, 2), (2, 1), (1, 1), None),
        ((2, 3), (3, 2), (0, 1), 5),
        ((3,), (2,), (1,), None),
    ],
)
def test_average_pool_backward(
    kernel: tuple[int, ...], stride: tuple[int, ...], padding: tuple[int, ...], divisor: int | None
) -> None:
    x = doubles(2, 3, 7, 8)
    y = F.avg_pool2d(x, kernel, stride or None, padding, divisor_override=divisor)
    grad = doubles(*y.shape, seed=1)
    options = (kernel, stride, padding, False, True, divisor)
    expected = aten.avg_pool2d_backward(grad, x, *options)
    torch.testing.assert_close(avg_pool2d_backward(grad, x, *options), expected, **EXACT)


PARTIAL = [
    # kernel, stride, padding, ceil_mode, count_include_pad, divisor
    ((2, 2), (), (0, 0), True, True, None),
    ((3, 2), (2, 2), (1, 1), True, True, None),
    ((3, 2), (2, 1), (1, 0), False, False, None),
    ((3, 3), (2, 2), (1, 1), True, False, None),
    ((3, 2), (2, 2), (1, 1), True, True, 5),
    ((3,), (2,), (1,), True, False, 2),
]


@pytest.mark.parametrize("options", PARTIAL)
def test_average_pools_of_partial_windows(options: tuple[Any, ...]) -> None:
    x = doubles(2, 3, 7, 8)
    y = aten.avg_pool2d(x, *options)
    if options[-1] is not None:
        torch.testing.assert_close(avg_pool2d(x, *options), y, **EXACT)
    grad = doubles(*y.shape, seed=1)
    expected = aten.avg_pool2d_backward(grad, x, *options)
    torch.testing.assert_close(avg_pool2d_backward(grad, x, *options), expected, **EXACT)


@pytest.mark.parametrize("size", [(1, 1), (7, 4), (3, 5), (2, 8)])
def test_adaptive_average_pool_backward(size: tuple[int, int]) -> None:
    x, grad = doubles(2, 3, 7, 8), doubles(2, 3, *size, seed=1)
    expected = aten._adaptive_avg_pool2d_backward(grad, x)
    torch.testing.assert_close(adaptive_avg_pool2d_backward(grad, x), expected, **EXACT)


@pytest.mark.parametrize("size", [(1, 1), (7, 4), (1, 8)])
def test_adaptive_max_pool_backward(size: tuple[int, int]) -> None:
    x, grad = doubles(2, 3, 7, 8), doubles(2, 3, *size, seed=1)
    _, places = F.adaptive_max_pool2d(x, size, return_indices=True)
    expected = aten.adaptive_max_pool2d_backward(grad, x, places)
    torch.testing.assert_close(adaptive_max_pool2d_backward(grad, x, places), expected, **EXACT)


def test_adaptive_max_pools_of_uneven_areas_are_refused() -> None:
    x = doubles(2, 3, 7, 8)
    with pytest.raises(
        LoweringError, match=r"of \[7, 8\] positions into \[2, 4\] .* use numbers that divide"
    ):
        adaptive_max_pool2d_backward(doubles(2, 3, 2, 4), x, torch.zeros(2, 3, 2, 4, dtype=torch.int64))


@pytest.mark.parametrize("padding", [-1, 2])
def test_embedding_backward(padding: int) -> None:
    grad, ids = doubles(4, 6, 3), torch.from_numpy(np.random.default_rng(0).integers(0, 5, (4, 6)))
    expected = aten.embedding_dense_backward(grad, ids, 7, padding, False)
    assert torch.equal(embedding_backward(grad, ids, 7, padding, False), expected)
    with pytest.raises(
        LoweringError, match="scale_grad_by_freq cannot be trained on devices yet: switch it off"
    ):
        embedding_backward(grad, ids, 7, padding, True)


def test_an_embeddings_gradient_is_exact_in_onnxruntime() -> None:
    """A token that comes often: an addition lost, or in another order, would show in the last digits."""

    def gradient(ids: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        scale = torch.arange(1.0, 9.0)
        return (torch.func.grad(lambda w: (F.embedding(ids.long(), w).sin() * scale).sum())(weight),)

    weight = doubles(5, 8).float()
    inputs = {"ids": torch.zeros(11, 7), "weight": weight}
    model = lower(gradient, inputs, ["gradient"], {"ids": {0: "batch"}})
    assert "ScatterND" not in {node.op_type for node in model.graph.node}
    ids = np.random.default_rng(0).integers(0, 5, (300, 7)).astype(np.float32)
    got = run(session(model.SerializeToString()), {"ids": ids, "weight": weight.numpy()})["gradient"]
    expected = gradient(torch.from_numpy(ids).double(), weight.double())[0]
    np.testing.assert_allclose(got, expected.numpy(), rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 5), (4, 3, 2, 5)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_backward(shape: tuple[int, ...], affine: bool) -> None:
    x = doubles(*shape) * 3 + 2
    weight, bias = (doubles(3, seed=1), doubles(3, seed=2)) if affine else (None, None)
    _, mean, inverse = aten.native_batch_norm(x, weight, bias, None, None, True, 0.1, 1e-3)
    grad = doubles(*shape, seed=3)
    arguments = (grad, x, weight, None, None, mean, inverse, True, 1e-3, [True, True, True])
    for got, expected in zip(
        batch_norm_backward(*arguments), aten.native_batch_norm_backward(*arguments), strict=True
    ):
        if expected is not None:
            torch.testing.assert_close(got, expected, **EXACT)


POOLS = {
    "2 x 2": {"kernel_size": 2},
    "3 x 2": {"kernel_size": (3, 2)},
    "2 x 2 of an odd size": {"kernel_size": 2},
    "overlapping": {"kernel_size": 3, "stride": 2},
    "padded": {"kernel_size": 3, "stride": 2, "padding": 1},
    "2 x 2 padded": {"kernel_size": 2, "padding": 1},
    "rectangular": {"kernel_size": (2, 3), "stride": (1, 2)},
    "dilated": {"kernel_size": 2, "dilation": 2},
    "dilated, of an even size": {"kernel_size": 2, "dilation": 2, "ceil_mode": True},
    "with partial windows": {"kernel_size": 2, "ceil_mode": True},
    "padded with partial windows": {"kernel_size": 3, "stride": 2, "padding": 1, "ceil_mode": True},
}


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("name", POOLS)
def test_max_pool_backward_in_onnxruntime(name: str, rectified: bool) -> None:
    options = POOLS[name]
    shape = (2, 3, 6, 8) if name in ("2 x 2", "3 x 2", "dilated, of an even size") else (2, 3, 7, 9)

    def pooled(x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(x) if rectified else x, **options)  # type: ignore[arg-type]

    weights = doubles(*pooled(torch.zeros(shape)).shape[1:], seed=1).float()

    def gradient(x: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        return (torch.func.grad(lambda x: (pooled(x) * weights).sum())(x),)

    inputs = {"x": torch.zeros(5, *shape[1:]), "weights": torch.zeros_like(weights)}
    graph = session(lower(gradient, inputs, ["gradient"], {"x": {0: "batch"}}).SerializeToString())
    draw = np.random.default_rng(3)
    for x in (
        draw.normal(size=shape),
        draw.integers(0, 3, shape),  # ties everywhere: the first of a window takes all
        np.zeros(shape),  # what a ReLU leaves
        np.maximum(draw.normal(size=shape), 0),
        -draw.integers(1, 3, shape),  # padding must not win against negative values
    ):
        x = x.astype(np.float32)
        (expected,) = gradient(torch.from_numpy(x), weights)
        np.testing.assert_allclose(
            run(graph, {"x": x, "weights": weights.numpy()})["gradient"], expected.numpy(), **FLOAT32
        )


def test_pools_side_by_side_are_not_scattered() -> None:
    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.func.grad(lambda x: F.max_pool2d(x, 2).square().sum())(x),)

    for size, scattered in ((6, False), (7, True)):
        graph = lower(gradient, {"x": torch.zeros(5, 3, size, size)}, ["gradient"], {"x": {0: "batch"}}).graph
        assert ("ScatterElements" in {node.op_type for node in graph.node}) is scattered


@pytest.mark.parametrize("gate", [True, False])
def test_a_number_less_itself_is_left_out(gate: bool) -> None:
    """The straight-through mask is hard + (distance - distance): in the graph only its gradient is left."""

    def mask(distance: Tensor) -> tuple[Tensor, ...]:
        def total(distance: Tensor) -> tuple[Tensor, Tensor]:
            found = straight_through(distance, "identity", gate)
            return (found * torch.arange(1.0, 8.0)).sum(), found

        gradient, found = torch.func.grad(total, has_aux=True)(distance)
        return found, gradient

    distance = torch.tensor([-2.0, -0.5, 0.0, 1e-30, 0.5, 1.0, 2.0])
    model = lower(mask, {"distance": distance}, ["mask", "gradient"], {})
    assert not [node for node in model.graph.node if node.op_type == "Sub"]
    got = run(session(model.SerializeToString()), {"distance": distance.numpy()})
    for key, expected in zip(("mask", "gradient"), mask(distance), strict=True):
        np.testing.assert_array_equal(got[key], expected.numpy())


def test_norms() -> None:
    def norms(x: Tensor) -> tuple[Tensor, ...]:
        one = torch.linalg.vector_norm
        return one(x), one(x, dim=1), one(x, dim=(0, 2), keepdim=True)

    x = doubles(4, 3, 5).float()
    model = lower(norms, {"x": x}, ["all", "some", "kept"], {})
    got = run(session(model.SerializeToString()), {"x": x.numpy()})
    for value, expected in zip(got.values(), norms(x), strict=True):
        np.testing.assert_allclose(value, expected.numpy(), **FLOAT32)
    with pytest.raises(LoweringError, match="a norm of order 1 cannot be exported yet: use order 2"):
        lower(lambda x: (torch.linalg.vector_norm(x, 1),), {"x": x}, ["norm"], {})


def test_a_rectified_tensor_read_twice_keeps_both_readers() -> None:
    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        def twice(x: Tensor) -> Tensor:
            y = torch.relu(x)
            return F.max_pool2d(y, 2).square().sum() + y.square().sum()

        return (torch.func.grad(twice)(x),)

    x = doubles(2, 3, 6, 8).float()
    graph = session(lower(gradient, {"x": x}, ["gradient"], {}).SerializeToString())
    np.testing.assert_allclose(run(graph, {"x": x.numpy()})["gradient"], gradient(x)[0].numpy(), **FLOAT32)


def test_the_pool_under_a_relu_works_on_what_is_left() -> None:
    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.func.grad(lambda x: F.max_pool2d(F.relu(x), 2).square().sum())(x),)

    x = torch.zeros(5, 3, 6, 8)
    nodes = lower(gradient, {"x": x}, ["gradient"], {"x": {0: "batch"}}).graph.node
    pools = [node for node in nodes if node.op_type == "MaxPool"]
    (relu,) = [node for node in nodes if node.op_type == "Relu"]
    assert relu.input[0] == pools[0].output[0]
    # two pools written alike, without indices: a runtime merges them
    assert len({str(pool.attribute) for pool in pools}) == 1
    assert all(len(pool.output) == 1 for pool in pools)


@pytest.mark.parametrize(("shape", "columns"), [((5, 7), 1), ((5, 28), 4), ((5, 7, 3, 3), 1)])
def test_gradient_of_selected_columns(shape: tuple[int, ...], columns: int) -> None:
    def gradient(weight: Tensor, active: Tensor) -> tuple[Tensor, ...]:
        return (torch.func.grad(lambda w: select_columns(w, active, columns).square().sum())(weight),)

    weight, inputs = doubles(*shape).float(), ("weight", "active.layer")
    example = dict(zip(inputs, (weight, torch.tensor([0, 2, 3])), strict=True))
    model = lower(gradient, example, ["gradient"], {"active.layer": {0: "k"}})
    assert "ScatterND" not in {node.op_type for node in model.graph.node}
    graph = session(model.SerializeToString())
    for active in ([1, 6], [4], [0, 1, 2, 3, 4, 5, 6]):
        index = torch.tensor(active)
        got = run(graph, {"weight": weight.numpy(), "active.layer": index.numpy()})["gradient"]
        np.testing.assert_array_equal(got, gradient(weight, index)[0].numpy())


def gradients_of(model: nn.Module, shape: tuple[int, ...]) -> None:
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def function(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        def loss(named: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(model, named, (x,)).square().sum()  # type: ignore[no-any-return]

        return tuple(torch.func.grad(loss)(dict(zip(parameters, values, strict=True))).values())

    inputs = {"x": torch.zeros(7, *shape), **parameters}
    lower(function, inputs, [f"by.{name}" for name in parameters], {"x": {0: "batch"}})


class InPlace(nn.Module):
    """Writes into what nothing else sees, as nn.ReLU(inplace=True) does; the values before are needed backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        before = y * 2
        return ((y + 1).relu_() + before).clamp_(-1, 2)


class IntoView(InPlace):
    """Writes into what another name sees too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        view = y.view(-1, 3, 1)
        return y.relu_() * view[:, :, 0]


def test_what_writes_in_place_alone_returns_something_new() -> None:
    layer = InPlace().requires_grad_(False)

    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.func.grad(lambda x: layer(x).square().sum())(x),)

    x = doubles(6, 4).float()
    graph = session(lower(gradient, {"x": x}, ["gradient"], {}).SerializeToString())
    np.testing.assert_allclose(run(graph, {"x": x.numpy()})["gradient"], gradient(x)[0].numpy(), **FLOAT32)


def test_a_linear_layer_on_a_sequence_leaves_the_batch_open() -> None:
    """With a bias torch counts the rows, and takes the batch it was traced with for a constant."""
    layer = nn.Linear(4, 3).requires_grad_(False)

    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        return (torch.func.grad(lambda x: layer(x).square().sum())(x),)

    model = lower(gradient, {"x": torch.zeros(11, 5, 4)}, ["gradient"], {"x": {0: "batch"}})
    x = doubles(3, 5, 4).float()
    got = run(session(model.SerializeToString()), {"x": x.numpy()})["gradient"]
    np.testing.assert_allclose(got, gradient(x)[0].numpy(), **FLOAT32)


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (nn.ConvTranspose2d(2, 4, 3), (2, 5, 5), "a transposed convolution .* use an ordinary Conv2d"),
        (
            nn.Sequential(nn.Conv1d(1, 2, 1), nn.AdaptiveMaxPool1d(2)),
            (1, 5),
            "an adaptive max pool of .* use numbers",
        ),
        (IntoView(), (4,), "relu_.* writes in place, which has no graph: replace that operation"),
    ],
    ids=["transposed", "adaptive max pool", "in place"],
)
def test_what_has_no_form_is_named(model: nn.Module, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(LoweringError, match=words):
        gradients_of(model, shape)
