"""The proof that a bundle's graphs compute what PyTorch does, made before the bundle is written.

Every step starts from eager's own state, so that differences cannot feed on themselves: float rounding alone makes
two correct trainings part after some ten steps.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Protocol, TypeAlias

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.host import Arrays, GraphHost, run, session
from spafl import algorithm
from spafl.errors import SpaflError
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats
from spafl.manifest import Manifest
from spafl.rows import infer_graph, training_rows
from trainer.local import Momenta, sgd_step, zero_momenta

DENSITIES = (1.0, 0.5, 0.3, 0.1)
BATCHES = (16, 16, 7, 16, 5, 16, 16, 9, 16, 3)
"""Batch sizes of the ten steps: whole ones and partial ones."""

STEP = Hyperparameters(lr=0.01, threshold_lr=0.002, coeff=0.01, clip=1.0)
STEP_TOLERANCE = 1e-5
"""Of a step's loss, next state and momenta, relative to the tensor's largest magnitude: some 100 float32 roundings."""
CONDITION_FACTOR = 8.0
"""Where a step is ill-conditioned, a graph may be this much further from float64 than float32 eager is itself."""
DRAWS = 3
"""Batches to try a step on. A ReLU or a pool may sit on its edge for one batch, where the last bit decides which way
the whole gradient of an example goes; a mistake in the graph sits there for all of them."""
LARGE = 2_000_000
"""Weights from which on one draw has to do: none is free of edges, and each takes ten seconds."""
NUDGES = 3
NUDGE = 1e-6
"""A large model has a million activations, of which some sit on an edge for every batch: ResNet-18's step by two of
PyTorch's own convolutions differs by 0.07. So on the last draw a graph may also be further from float64 by that factor
than eager is from weights that are changed by this much, which is what a thousand roundings come to."""
ROUND_TOLERANCE = 1e-6
"""Of begin and end of a round: a handful of roundings."""
INFERENCE_TOLERANCE = 1e-5
"""Of logits, relative to the largest: the bar for compact against masked."""

Floating: TypeAlias = NDArray[np.floating]


class Host(Protocol):
    """What takes the steps: `GraphHost`, or the runtime of another engine, whose `rows` and `active` are empty."""

    state: Arrays
    momenta: Arrays
    active: Arrays
    rows: Arrays

    def synchronise(self, state: Mapping[str, Floats], momenta: Mapping[str, Floats]) -> None:
        """Returns nothing; the next step starts from the given whole state and momenta."""
        ...

    def step(self, x: Floats, y: NDArray[np.int64], h: Hyperparameters) -> tuple[float, int]:
        """Returns mean task loss and right predictions of one step; state and momenta move on."""
        ...


class ParityError(SpaflError):
    """A graph differs from PyTorch by more than its tolerance, so nothing was written. Names the tensor."""


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison: the worst tensor's difference, relative to its largest magnitude, and what is allowed."""

    check: str
    density: float
    compared: int
    worst: str
    difference: float
    tolerance: float


def check_parity(
    model: nn.Module,
    manifest: Manifest,
    files: Mapping[str, bytes],
    *,
    seed: int = 0,
    examples: tuple[Floats, NDArray[np.int64]] | None = None,
    progress: Callable[[Check], None] = lambda check: None,
) -> tuple[Check, ...]:
    """Returns the checks passed by the graphs in `files` against the sparsified `model`.

    examples  (n, *shape) and (n,) to train on; random ones if None

    Raises:
        ParityError: a difference is larger than its tolerance.
    """
    checks = []
    for check in _checks(model, manifest, files, np.random.default_rng(seed), examples):
        if not check.difference <= check.tolerance:  # NaN is no parity either
            raise ParityError(
                f"{check.check} at density {check.density}: {check.worst} "
                f"differs from PyTorch by {check.difference:.1e}, allowed {check.tolerance:.1e}. No bundle was "
                "written; please report the model"
            )
        checks.append(check)
        progress(check)
    return tuple(checks)


def to_bytes(checks: tuple[Check, ...]) -> bytes:
    """Returns the checks as `parity.json`, with the versions they hold for."""
    versions = {"torch": torch.__version__, "onnxruntime": ort.__version__, "numpy": np.__version__}
    return json.dumps(
        {"versions": versions, "checks": [asdict(check) for check in checks]}, indent=1
    ).encode()


def _checks(
    model: nn.Module,
    manifest: Manifest,
    files: Mapping[str, bytes],
    draw: np.random.Generator,
    examples: tuple[Floats, NDArray[np.int64]] | None,
) -> Iterator[Check]:
    layout = manifest.layout
    host = GraphHost(manifest, files)
    for density in DENSITIES:
        eager = copy.deepcopy(model)
        _shake_norms(eager, draw)
        state = _state(eager, manifest)
        target = algorithm.thresholds_at(layout, state, density, draw)
        base = (target - draw.normal(0, 0.01, layout.size)).astype(np.float32)
        begun = host.begin_round(state, base, target)
        expected, collapsed = algorithm.reset_collapsed(
            layout, algorithm.apply_global(layout, state, base, target)
        )
        yield _compared("begin of a round", density, host.state, expected, ROUND_TOLERANCE)
        yield _exact(
            "active rows and collapse guard",
            density,
            _begun(manifest, expected, collapsed),
            begun,
        )

        eager.load_state_dict(
            {name: torch.from_numpy(value.copy()) for name, value in expected.items()}, strict=False
        )
        yield from _programs(eager, manifest, files, density, draw, examples)
        yield _threshold_gradients(eager, host, manifest, density, _batch(manifest, 16, draw, examples))
        eager, momenta, check = _steps(eager, host, manifest, density, draw, examples)
        yield check
        trained = _state(eager, manifest)
        host.synchronise(trained, _arrays(momenta))
        host.state = {
            **trained,
            **{name: expected[name] for name in host.rows},
        }  # rows go back into the old whole
        ended = host.end_round()
        yield _compared(
            "end of a round",
            density,
            {**host.state, "thresholds": ended["thresholds"], "density": ended["density"]},
            {
                **trained,
                "thresholds": layout.join(trained),
                "density": np.array(list(algorithm.densities(layout, trained).values()), np.float32),
            },
            ROUND_TOLERANCE,
        )
        yield from _inference(eager, manifest, files, trained, density, draw, examples)


def _programs(
    eager: nn.Module,
    manifest: Manifest,
    files: Mapping[str, bytes],
    density: float,
    draw: np.random.Generator,
    examples: tuple[Floats, NDArray[np.int64]] | None,
) -> Iterator[Check]:
    """Yields the checks of the ExecuTorch programs, if the bundle has some; eager stays as it is."""
    if "executorch" not in manifest.engines:
        return
    from export.executorch_host import ProgramHost

    # its steps take whole tensors, whatever those of onnx take
    whole = tuple(replace(tensor, rows=False) for tensor in manifest.state)
    manifest = replace(manifest, state=whole)
    host = ProgramHost(manifest, files)
    batch = _batch(manifest, 16, draw, examples)
    check = _threshold_gradients(eager, host, manifest, density, batch)
    yield replace(check, check="gradients, executorch")
    trained, _, check = _steps(copy.deepcopy(eager), host, manifest, density, draw, examples)
    yield replace(check, check="ten steps, executorch")
    x, _ = _batch(manifest, 33, draw, examples)
    with torch.no_grad():
        expected = {"logits": trained.eval()(torch.from_numpy(x)).numpy()}
    got = {"logits": host.predict(_state(trained, manifest), x)}
    yield _compared("inference, executorch", density, got, expected, INFERENCE_TOLERANCE)


def _steps(
    eager: nn.Module,
    host: Host,
    manifest: Manifest,
    density: float,
    draw: np.random.Generator,
    examples: tuple[Floats, NDArray[np.int64]] | None,
) -> tuple[nn.Module, Momenta, Check]:
    """Returns eager and its momenta after the steps of BATCHES, and the check of the worst of them."""
    momenta = zero_momenta(eager)
    draws = 1 if sum(value.numel() for value in eager.parameters()) > LARGE else DRAWS
    steps = []
    for size in BATCHES:
        for left in reversed(range(draws)):
            before = copy.deepcopy((eager, momenta))
            batch = _batch(manifest, size, draw, examples)
            check = check_step(eager, momenta, host, manifest, density, batch, nudges=0 if left else NUDGES)
            if check.difference <= check.tolerance:
                break
            eager, momenta = before
        steps.append(check)
    return eager, momenta, max(steps, key=lambda check: check.difference / check.tolerance)


def _threshold_gradients(
    eager: nn.Module,
    host: Host,
    manifest: Manifest,
    density: float,
    batch: tuple[Floats, NDArray[np.int64]],
) -> Check:
    """Returns the check of the task's own gradients of the thresholds: with the regulariser on, it hides their loss."""
    h = Hyperparameters(lr=1e-3, coeff=0.0, momentum=0.0)
    names = [layer.threshold for layer in manifest.layout.layers]
    before = copy.deepcopy(eager), zero_momenta(eager)
    host.synchronise(_state(eager, manifest), _arrays(before[1]))
    host.step(*batch, h)
    sgd_step(*before, *_tensors(batch), h)
    expected = {name: before[1][name].numpy() for name in names}
    # pruned to the bone a small model may say nothing any more; with all filters it must
    if density == max(DENSITIES) and not any(value.any() for value in expected.values()):
        raise ParityError("PyTorch itself gives the thresholds no gradient: is the model's output constant?")
    terms = {}
    for layer in manifest.layout.layers:
        # a sum over j of (dL/dW_ij) W_ij: before a batch norm it cancels to 0, so its terms are the measure
        gradient, weight = before[1][layer.weight], before[0].state_dict()[layer.weight]
        terms[layer.threshold] = float((gradient * weight).abs().flatten(1).sum(1).max()) / layer.scale

    def largest(got: Mapping[str, Floating], truth: Mapping[str, Floating]) -> tuple[float, str]:
        return max((float(np.abs(got[n] - truth[n]).max()) / max(terms[n], 1e-12), n) for n in names)

    difference, worst = largest(host.momenta, expected)
    tolerance = STEP_TOLERANCE
    if difference > tolerance:
        # pruned to the bone, a norm may see channels of variance 0, and what remains is rounding: float64 tells
        exact = copy.deepcopy(eager).double()
        moved = zero_momenta(exact)
        sgd_step(exact, moved, torch.from_numpy(batch[0]).double(), torch.from_numpy(batch[1]), h)
        truth = {name: moved[name].numpy() for name in names}
        difference, worst = largest(host.momenta, truth)
        tolerance = max(tolerance, CONDITION_FACTOR * largest(expected, truth)[0])
    return Check("threshold gradients, coeff = 0", density, len(names), worst, difference, tolerance)


def check_step(
    eager: nn.Module,
    momenta: Momenta,
    host: Host,
    manifest: Manifest,
    density: float,
    batch: tuple[Floats, NDArray[np.int64]],
    h: Hyperparameters = STEP,
    nudges: int = 0,
) -> Check:
    """Returns the check of one step from eager's state; eager and its momenta move on.

    nudges   how many slightly different weights to take as a measure of what float32 leaves open, if all else fails
    """
    exact = copy.deepcopy(eager).double()
    exact_momenta = {name: value.double() for name, value in momenta.items()}
    host.synchronise(_state(eager, manifest), _arrays(momenta))
    loss, _ = host.step(*batch, h)
    step = sgd_step(eager, momenta, *_tensors(batch), h)

    def view(model: nn.Module, of: Momenta) -> Arrays:
        state, moved = _state(model, manifest), _arrays(of)
        for tensor in manifest.state:
            if tensor.rows:
                index = host.active[str(tensor.layer)]
                state[tensor.name] = state[tensor.name][index]
                if tensor.trained:
                    moved[tensor.name] = moved[tensor.name][index]
        return {**state, **{f"momentum.{name}": value for name, value in moved.items()}}

    got = {**host.state, **host.rows, **{f"momentum.{name}": value for name, value in host.momenta.items()}}
    expected = view(eager, momenta)
    got["loss"], expected["loss"] = np.asarray(loss), np.asarray(step.loss)
    check = _compared("ten training steps", density, got, expected, STEP_TOLERANCE)
    if check.difference <= STEP_TOLERANCE:
        return check
    # rounding the model itself cannot resolve, a ReLU at 0 or a batch variance near 0: float64 tells
    others = [(_nudged(exact, seed), copy.deepcopy(exact_momenta)) for seed in range(nudges)]

    def stepped(model: nn.Module, moved: Momenta) -> dict[str, Floating]:
        dtype = next(model.parameters()).dtype
        moved = {name: value.to(dtype) for name, value in moved.items()}
        loss = sgd_step(
            model, moved, torch.from_numpy(batch[0]).to(dtype), torch.from_numpy(batch[1]), h
        ).loss
        return {**view(model, moved), "loss": np.asarray(loss)}

    truth = stepped(exact, exact_momenta)
    open_by = [
        max(_difference(one[name], truth[name], _floor(name, truth)) for name in truth)
        for one in (expected, *(stepped(*other) for other in others))
    ]
    allowed = CONDITION_FACTOR * max(open_by)
    return _compared("ten training steps", density, got, truth, max(STEP_TOLERANCE, allowed))


def _nudged(model: nn.Module, seed: int) -> nn.Module:
    """Returns `model` in float32, its weights changed by a millionth of each."""
    draw, model = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not name.endswith(".threshold"):  # a filter must not change sides
                value.mul_(1 + NUDGE * torch.randn(value.shape, generator=draw, dtype=value.dtype))
    return model.float()


def _inference(
    eager: nn.Module,
    manifest: Manifest,
    files: Mapping[str, bytes],
    state: Mapping[str, Floats],
    density: float,
    draw: np.random.Generator,
    examples: tuple[Floats, NDArray[np.int64]] | None,
) -> Iterator[Check]:
    x, _ = _batch(manifest, 33, draw, examples)
    eager.eval()
    with torch.no_grad():
        expected = {"logits": eager(torch.from_numpy(x)).numpy()}
    small, supplied = infer_graph(files["infer.onnx"], manifest, state)
    for role, graph, given in (("masked", files["masked.onnx"], state), ("infer", small, supplied)):
        got = run(session(graph, given), {"x": x})
        name = "compact inference" if role == "infer" else "masked inference"
        yield _compared(name, density, got, expected, INFERENCE_TOLERANCE)


def _begun(manifest: Manifest, state: Mapping[str, Floats], collapsed: list[str]) -> Arrays:
    layers = manifest.layout.layers
    expected: Arrays = {"collapsed": np.array([layer.name in collapsed for layer in layers])}
    rows = training_rows(manifest, algorithm.mask_of(manifest.layout, state))
    return expected | {f"active.{name}": index for name, index in rows.items()}


def _exact(check: str, density: float, expected: Arrays, got: Arrays) -> Check:
    wrong = [name for name, value in expected.items() if not np.array_equal(got[name], value)]
    return Check(check, density, len(expected), wrong[0] if wrong else "all equal", float(len(wrong)), 0.0)


def _compared(
    check: str,
    density: float,
    got: Mapping[str, Floating],
    expected: Mapping[str, Floating],
    tolerance: float,
) -> Check:
    differences = {
        name: _difference(got[name], value, _floor(name, expected)) for name, value in expected.items()
    }
    worst = max(differences, key=lambda name: (np.isnan(differences[name]), differences[name]))
    return Check(check, density, len(expected), worst, differences[worst], tolerance)


def _difference(got: Floating, expected: Floating, floor: float) -> float:
    if got.shape != expected.shape:
        return float("nan")
    if expected.size == 0:
        return 0.0
    scale = max(float(np.abs(expected).max()), floor, 1e-12)
    return float(np.abs(got.astype(np.float64) - expected).max()) / scale


def _floor(name: str, tensors: Mapping[str, Floating]) -> float:
    """Returns the least magnitude a difference in `name` is measured by.

    For a momentum, a thousandth of the largest one: a bias before a batch norm has a gradient of 0 but for rounding,
    and rounding is no measure of itself.
    """
    if not name.startswith("momentum."):
        return 0.0
    momenta = (value for other, value in tensors.items() if other.startswith("momentum.") and value.size)
    return 1e-3 * max(float(np.abs(value).max()) for value in momenta)


def _batch(
    manifest: Manifest,
    size: int,
    draw: np.random.Generator,
    examples: tuple[Floats, NDArray[np.int64]] | None,
) -> tuple[Floats, NDArray[np.int64]]:
    if examples is not None:
        chosen = draw.integers(0, len(examples[1]), size)
        return np.ascontiguousarray(examples[0][chosen], np.float32), examples[1][chosen]
    if manifest.input.ids is not None:
        x = draw.integers(0, manifest.input.ids, (size, *manifest.input.shape)).astype(np.float32)
    else:
        x = draw.normal(0, 1, (size, *manifest.input.shape)).astype(np.float32)
    return x, draw.integers(0, len(manifest.labels), size)


def _tensors(batch: tuple[Floats, NDArray[np.int64]]) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(batch[0]), torch.from_numpy(batch[1])


def _state(model: nn.Module, manifest: Manifest) -> dict[str, Floats]:
    values = model.state_dict()
    return {tensor.name: values[tensor.name].numpy().copy() for tensor in manifest.state}


def _arrays(momenta: Momenta) -> dict[str, Floats]:
    return {name: value.numpy().copy() for name, value in momenta.items()}


def _shake_norms(model: nn.Module, draw: np.random.Generator) -> None:
    """Moves norms away from their start, where their shift is 0 and hides mistakes."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm | nn.LayerNorm):
                for parameter in module.parameters():
                    parameter.add_(torch.from_numpy(draw.normal(0, 0.2, parameter.shape).astype(np.float32)))
