"""ExecuTorch programs compute what PyTorch does, and each fault known to be silent is caught here."""

import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export import executorch_programs as programs
from export import parity, portable
from export.compact import CompactModel
from export.decompositions import LoweringError
from export.lowering import trace
from export.portable import portable_decompositions
from export.portable_graph import tidy_up
from export.training import state_tensors
from spafl import algorithm
from spafl.errors import SettingsError
from spafl.manifest import EngineFiles, InputSpec, Manifest, TrainStep
from tests.export.models import LABELS, Normed
from trainer.masked import straight_through
from trainer.sparsify import layout_of, sparsify

pytest.importorskip(
    "executorch", reason="pip install --no-deps executorch==1.5.1 and what `make engines` names"
)

aten = torch.ops.aten

FLOAT64 = 1e-13
"""Of decompositions in float64, relative: sums in another order."""
FLOAT32 = 2e-6
"""Of small programs, relative: some ten roundings of float32."""


def difference(got: Tensor | np.ndarray, expected: Tensor) -> float:
    expected = expected.detach()
    return float((torch.as_tensor(got) - expected).abs().max() / expected.abs().max())


def loaded(program: bytes) -> Callable[..., list[np.ndarray]]:
    from export.executorch_host import LoadedProgram

    opened = LoadedProgram(program)
    return lambda *values: opened.run([value.numpy() for value in values])


CONVOLUTIONS = [  # channels, out, kernel, stride, padding, dilation, groups
    (1, 4, 5, 1, 0, 1, 1),
    (4, 6, 3, 2, 1, 1, 2),
    (4, 6, 3, 1, 2, 2, 1),
    (4, 4, 1, 1, 0, 1, 1),
    (4, 6, 2, 3, 1, 1, 1),
    (4, 4, 3, 1, 1, 1, 4),
]


@pytest.mark.parametrize("block_bytes", [portable.BLOCK_BYTES, 200], ids=["whole", "in blocks"])
@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
def test_convolutions(geometry: tuple[int, ...], block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "BLOCK_BYTES", block_bytes)
    channels, out, kernel, stride, padding, dilation, groups = geometry
    torch.manual_seed(1)
    x = torch.randn(3, channels, 11, 9, dtype=torch.float64)
    weight = torch.randn(out, channels // groups, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(out, dtype=torch.float64)
    rest = ([stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], groups)
    expected = aten.convolution(x, weight, bias, *rest)
    assert difference(portable.convolution(x, weight, bias, *rest), expected) < FLOAT64
    grad = torch.randn_like(expected)
    gradients = aten.convolution_backward(grad, x, weight, [out], *rest, [True] * 3)
    got = portable.convolution_backward(grad, x, weight, [out], *rest, [True] * 3)
    assert max(map(difference, got, gradients)) < FLOAT64  # type: ignore[arg-type]


POOLS = [  # kernel, stride, padding, dilation, ceil
    (2, 2, 0, 1, False),
    (3, 2, 1, 1, False),
    (2, 2, 0, 1, True),
    (3, 1, 1, 1, False),
    (2, 2, 0, 2, False),
    (2, 3, 1, 1, True),
]


@pytest.mark.parametrize("geometry", POOLS, ids=str)
def test_max_pools_give_ties_to_the_first(geometry: tuple[int, int, int, int, bool]) -> None:
    kernel, stride, padding, dilation, ceil = geometry
    torch.manual_seed(1)
    x = torch.randint(-2, 2, (3, 2, 11, 9)).float()  # whole numbers: full of ties, and every sum exact
    rest = ([kernel], [stride], [padding], [dilation], ceil)
    expected, indices = aten.max_pool2d_with_indices(x, *rest)
    assert torch.equal(portable.max_pool2d(x, *rest)[0], expected)
    grad = torch.randint(-5, 5, expected.shape).float()
    gradient = aten.max_pool2d_with_indices_backward(grad, x, *rest, indices)
    assert torch.equal(portable.max_pool2d_backward(grad, x, *rest, indices), gradient)


@pytest.mark.parametrize(
    "geometry", [(2, 2, 0, None), (3, 2, 1, None), (3, 1, 1, None), (3, 3, 0, 5)], ids=str
)
def test_average_pools(geometry: tuple[int, int, int, int | None]) -> None:
    kernel, stride, padding, divisor = geometry
    torch.manual_seed(1)
    x = torch.randn(3, 2, 11, 9, dtype=torch.float64)
    rest = ([kernel], [stride], [padding], False, True, divisor)
    expected = aten.avg_pool2d(x, *rest)
    assert difference(portable.avg_pool2d(x, *rest), expected) < FLOAT64
    grad = torch.randn_like(expected)
    gradient = aten.avg_pool2d_backward(grad, x, *rest)
    assert difference(portable.avg_pool2d_backward(grad, x, *rest), gradient) < FLOAT64


@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (7, 4)], ids=str)
def test_batch_norms(shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x, grad = torch.randn(2, *shape, dtype=torch.float64)
    weight, bias, mean = torch.randn(3, 4, dtype=torch.float64)
    expected = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, 1e-5)
    assert (
        max(map(difference, portable.batch_norm(x, weight, bias, None, None, True, 0.0, 1e-5), expected))
        < FLOAT64
    )
    rest = (grad, x, weight, None, None, *expected[1:], True, 1e-5, [True] * 3)
    gradients = aten.native_batch_norm_backward(*rest)
    assert max(map(difference, portable.batch_norm_backward(*rest), gradients)) < FLOAT64
    resting = (x, weight, bias, mean, mean.square(), False, 0.0, 1e-5)
    assert difference(portable.batch_norm(*resting)[0], torch.native_batch_norm(*resting)[0]) < FLOAT64


def test_the_straight_through_gradient_survives_the_export() -> None:
    """An autograd.Function is dropped by torch.export without a word: only the regulariser would move thresholds."""

    def gradients(x: Tensor, weight: Tensor, threshold: Tensor) -> tuple[Tensor, ...]:
        def loss(weight: Tensor, threshold: Tensor) -> Tensor:
            mask = straight_through(weight.abs().mean(1) - threshold, "identity")
            return F.linear(x, weight * mask[:, None]).square().mean()

        return torch.func.grad(loss, argnums=(0, 1))(weight, threshold)

    torch.manual_seed(1)
    x, weight, threshold = torch.randn(5, 7), torch.randn(6, 7), torch.full((6,), 0.7)
    program, _ = programs.program(gradients, {"x": x, "weight": weight, "threshold": threshold}, ("x",))
    expected = gradients(x, weight, threshold)
    assert expected[1].abs().max() > 1  # without the regulariser it is all a threshold has
    assert max(map(difference, loaded(program)(x, weight, threshold), expected)) < FLOAT32


def test_the_gradient_of_a_max_pool_starts_from_zeros() -> None:
    """ExecuTorch's own kernel adds to whatever the memory held before (pytorch/executorch#21686)."""

    def gradient(x: Tensor) -> tuple[Tensor]:
        before = torch.sin(x * 3.0).exp()  # leaves numbers where the gradient will be
        taken = torch.func.grad(lambda x: (F.max_pool2d(x, 2) * before[:, :, :4, :4]).sum())(x)
        return (taken * 1.0,)

    torch.manual_seed(1)
    x = torch.randn(5, 3, 8, 8)
    run = loaded(programs.program(gradient, {"x": x}, ("x",))[0])
    for _ in range(3):
        x = torch.randn(5, 3, 8, 8)
        assert difference(run(x)[0], gradient(x)[0]) < FLOAT32


@pytest.mark.parametrize("size", [1, 2, programs.MAX_BATCH])
def test_programs_run_any_batch_up_to_the_largest(size: int, head: Callable[..., list[np.ndarray]]) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(size, 7), torch.randn(6, 7)
    assert difference(head(x, weight)[0], F.linear(x, weight).softmax(1)) < FLOAT32


def test_programs_refuse_larger_batches(head: Callable[..., list[np.ndarray]]) -> None:
    with pytest.raises(RuntimeError):
        head(torch.zeros(programs.MAX_BATCH + 1, 7), torch.zeros(6, 7))


@pytest.fixture(scope="module")
def head() -> Callable[..., list[np.ndarray]]:
    inputs = {"x": torch.zeros(3, 7), "weight": torch.zeros(6, 7)}
    return loaded(programs.program(lambda x, weight: (F.linear(x, weight).softmax(1),), inputs, ("x",))[0])


def traced(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> torch.fx.GraphModule:
    return trace(function, inputs, [()] * len(inputs), portable_decompositions())


def test_state_is_written_over_when_nobody_reads_it_any_more() -> None:
    def step(weight: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return weight + 1, other, (weight * other).sum()

    graph = traced(step, torch.ones(3), torch.ones(3))
    tidy_up(graph, in_place=[(0, 0), (1, 1)])
    order = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert order.index(aten.add.Tensor) > order.index(aten.mul.Tensor)
    assert order[-1] is aten.clone.default  # the one handed through, which is no tensor of its own otherwise


def test_what_still_reads_the_state_gets_it_before_it_is_written_over() -> None:
    def swap(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return other * 2, one * 3

    graph = traced(swap, torch.ones(3), torch.ones(3))
    tidy_up(graph, in_place=[(0, 0), (1, 1)])
    order = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert order[:2] == [aten.mul.Tensor, aten.mul.Tensor]
    assert aten.clone.default in order[2:]


def test_large_matrices_are_not_transposed() -> None:
    def backward(x: Tensor, weight: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x @ weight.t(), grad @ weight, grad.t() @ x

    inputs = torch.randn(4, 300), torch.randn(200, 300), torch.randn(4, 200)
    graph = traced(backward, *inputs)
    tidy_up(graph)
    moved = [node.meta["val"].numel() for node in graph.graph.nodes if node.target is aten.permute.default]
    assert all(size < inputs[1].numel() for size in moved), graph.code
    assert max(map(difference, graph(*inputs), backward(*inputs))) < FLOAT32


def test_permutations_that_undo_each_other_are_taken_out() -> None:
    graph = traced(lambda x: (F.relu(x.permute(1, 2, 0) * 2).permute(2, 0, 1),), torch.randn(2, 3, 4))
    tidy_up(graph)
    assert not [node for node in graph.graph.nodes if node.target is aten.permute.default]
    x = torch.randn(2, 3, 4)
    assert torch.equal(graph(x)[0], F.relu(x * 2))


class Made:
    """A sparsified model, its programs, and a manifest that holds only what the parity check reads."""

    def __init__(self, plain: nn.Module) -> None:
        torch.manual_seed(3)
        shape: tuple[int, ...] = plain.shape  # type: ignore[assignment]
        self.model = sparsify(plain)
        tensors = state_tensors(
            self.model, CompactModel(self.model, shape, dropped=lambda group: group.exact, training=True)
        )
        layout = layout_of(self.model)
        self.files, self.entry = programs.executorch_programs(self.model, layout, tensors, shape)
        self.manifest = Manifest(
            name="test",
            layout=layout,
            state=tensors,
            input=InputSpec(shape=shape, mean=(0.0,) * shape[0], std=(1.0,) * shape[0]),
            labels=tuple(map(str, range(LABELS))),
            train_step=TrainStep(form="dense", reason="programs"),
            compaction=(),
            engines={"executorch": self.entry},
            files={name: {"bytes": 0, "sha256": "0" * 64} for name in self.files},
            producer={},
        )


@pytest.fixture(scope="module")
def normed() -> Made:
    return Made(Normed())


def test_steps_and_inference_equal_eager(normed: Made) -> None:
    """Thresholds' gradients with coeff = 0, ten steps on whole and partial batches, inference; half the filters."""
    draw = np.random.default_rng(2)
    state = {name: value.numpy().copy() for name, value in normed.model.state_dict().items()}
    layout = normed.manifest.layout
    thresholds = algorithm.thresholds_at(layout, state, 0.5, draw)
    with torch.no_grad():
        for layer in layout.layers:
            threshold = normed.model.get_parameter(layer.threshold)
            threshold.copy_(torch.from_numpy(thresholds[layer.offset : layer.offset + layer.out]))
    checks = list(parity._programs(normed.model, normed.manifest, normed.files, 0.5, draw, None))
    assert [check.check.partition(",")[0] for check in checks] == ["gradients", "ten steps", "inference"]
    for check in checks:
        assert check.difference <= check.tolerance, check


def test_the_manifest_tells_what_the_programs_need(normed: Made) -> None:
    entry = normed.entry
    assert entry.files == {"train_step": "train_step.pte", "evaluate": "evaluate.pte"}
    assert entry.requires == {"executorch": "1.5.1"}
    assert EngineFiles.from_text(json.dumps(entry.to_json())) == entry
    for operators in entry.operators.values():
        assert operators["aten::mm.out"] > 2
        # portable kernels that are wrong, or ten times too slow
        names = " ".join(operators)
        assert not [name for name in ("convolution", "pool2d", "addmm", "native_batch_norm") if name in names]


def test_what_has_no_program_is_named() -> None:
    with pytest.raises(LoweringError, match="transposed convolution"):
        programs.program(
            lambda x, w: (F.conv_transpose2d(x, w),),
            {"x": torch.zeros(3, 1, 4, 4), "w": torch.zeros(1, 2, 3, 3)},
            ("x",),
        )


@pytest.mark.parametrize("found", ["1.4.1", None])
def test_another_release_is_refused_before_any_work(
    found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if found is None:
            raise programs.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(programs, "version", version)
    with pytest.raises(
        SettingsError, match=r"needs ExecuTorch 1\.5\.1, found .*pip install --no-deps executorch=="
    ):
        programs.executorch_programs(nn.Identity(), None, (), ())  # type: ignore[arg-type]


def test_batches_are_traced_with_a_size_of_their_own() -> None:
    primes = [61, 59, 53]
    sizes = [programs._distinct_size([primes[:count]]) for count in range(3)]
    assert sizes == primes
    assert all(a != b for a, b in itertools.pairwise(sizes))
