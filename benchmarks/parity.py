"""Every engine against PyTorch eager, step by step: thresholds, weights, momentum, norm statistics.

Each step starts from eager's own state, so that rounding cannot feed on itself, on whole and partial batches; the
thresholds' gradients are also compared with the regulariser off, which would hide their loss. The first run exports
the models and keeps them.

    python benchmarks/parity.py [--engine onnx] [--model lenet5] [--json] [--check]
"""

import copy
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import nn

from device_runtime.engines import ENGINES, Engine, EngineError, open_engine, require_engine
from spafl import algorithm
from spafl.bundle import Bundle
from spafl.hyperparameters import Hyperparameters
from spafl.manifest import Manifest
from spafl.step import ACTIVE, MOMENTUM
from trainer.local import Momenta, sgd_step, zero_momenta
from trainer.models import MODELS
from trainer.sparsify import sparsify

DENSITIES = (1.0, 0.5, 0.1)
BATCHES = (16, 16, 7, 16, 5, 16, 16, 9, 16, 3)
"""Whole and partial batches of the ten steps."""
H = Hyperparameters(lr=0.01, threshold_lr=0.002, coeff=0.01, clip=1.0)
BARE = Hyperparameters(lr=0.01, coeff=0.0, momentum=0.0)
"""Without regulariser, clip and momentum: what is left of a threshold's momentum is the task's gradient."""

TOLERANCE = 1e-5
"""Relative to a tensor's largest magnitude: some hundred float32 roundings."""
CONDITION_FACTOR = 8.0
"""Where float32 itself is this bad, an engine may be this many times further from float64 than eager is."""
DRAWS = 6
"""Batches to try a step on: a ReLU or a pool may sit on its edge for one, where the last bit decides which way the
whole gradient of an example goes. A mistake sits there for all of them."""
KINDS = ("thresholds", "weights", "momentum", "statistics", "threshold gradients")

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class _Distances:
    """Of a tensor after a step, relative: the engine from eager, the engine from float64, eager from float64."""

    difference: float
    error: float
    rounding: float


@dataclass(frozen=True, slots=True)
class Parity:
    """The largest relative difference of one engine from eager, or float64, on one model at one density.

    difference  by kind of tensor
    rounding    eager's own largest difference from float64: what float32 leaves open
    missed      tensors that differ by more than `TOLERANCE`, and by more than such rounding explains
    """

    engine: str
    model: str
    density: float
    steps: int
    difference: dict[str, float]
    rounding: float
    missed: tuple[str, ...]


def main(
    engine: Annotated[list[str] | None, typer.Option(help="Only these; default: all that can run.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Only these; default: all.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a difference is too large.")] = False,
) -> None:
    """Compare every engine with PyTorch eager on every model."""
    from bundles import bundle  # only here: tests bring bundles of their own

    engines = tuple(engine or available())
    found = []
    for name in model or MODELS:
        source = bundle(name, engines=tuple(other for other in engines if other != "onnx"))
        eager = sparsify(MODELS[name]())
        found += [
            parity for each in engines for parity in compare(open_engine(each, source), source, eager, name)
        ]
    if as_json:
        print(json.dumps([asdict(parity) for parity in found], indent=2))
    else:
        show(found)
    missed = [
        f"{parity.engine} on {parity.model} at density {parity.density:g}: {tensor}"
        for parity in found
        for tensor in parity.missed
    ]
    if check and missed:
        print("\n".join(f"missed: {line}" for line in missed), file=sys.stderr)
        raise typer.Exit(1)


def available() -> Iterator[str]:
    """Yields the engines that can run here; says which cannot, and why."""
    for name in ENGINES:
        try:
            require_engine(name)
        except EngineError as error:
            print(f"without {name}: {error}", file=sys.stderr)
        else:
            yield name


def compare(engine: Engine, bundle: Bundle, model: nn.Module, name: str) -> Iterator[Parity]:
    """Yields the parity of `engine` with `model`, the sparsified one that `bundle` was made of, at each density."""
    manifest, draw = bundle.manifest, np.random.default_rng(0)
    state = bundle.initial_state()
    for density in DENSITIES:
        thresholds = algorithm.thresholds_at(manifest.layout, state, density, draw)
        engine.begin_round(state, thresholds, thresholds)
        active = {name: value for name, value in engine.checkpoint().items() if name.startswith(ACTIVE)}
        eager = copy.deepcopy(model)
        started = algorithm.apply_global(manifest.layout, state, thresholds, thresholds)
        eager.load_state_dict(
            {key: torch.from_numpy(value.copy()) for key, value in started.items()}, strict=False
        )
        momenta = zero_momenta(eager)
        spare = copy.deepcopy(eager), zero_momenta(eager)
        _step(engine, *spare, active, manifest, _batch(manifest, BATCHES[0], draw), BARE)
        gradients = _threshold_gradients(engine.checkpoint(), *spare, manifest)
        told = [("threshold gradients", key, value, TOLERANCE) for key, value in gradients.items()]
        rounding = 0.0
        for size in BATCHES:
            for _ in range(DRAWS):
                before = copy.deepcopy((eager, momenta))
                step = _step(engine, eager, momenta, active, manifest, _batch(manifest, size, draw), H)
                noise = max(each.rounding for each in step.values())
                allowed = max(TOLERANCE, CONDITION_FACTOR * noise)
                if all(each.difference <= TOLERANCE or each.error <= allowed for each in step.values()):
                    break
                eager, momenta = before
            rounding = max(rounding, noise)
            told += [
                (_kind(key, manifest), key, min(each.difference, each.error), allowed)
                for key, each in step.items()
            ]
        worst = dict.fromkeys(KINDS, 0.0)
        for kind, _, difference, _ in told:
            worst[kind] = max(worst[kind], difference)
        missed = [f"{key} differs by {value:.1e}" for _, key, value, allowed in told if not value <= allowed]
        yield Parity(engine.name, name, density, len(BATCHES), worst, rounding, tuple(missed))


def _threshold_gradients(
    got: Arrays, eager: nn.Module, gradients: Momenta, manifest: Manifest
) -> dict[str, float]:
    """Returns by threshold how far its gradient is from eager's, in units of the terms it is a sum of.

    It is sum_j (dL/dW_ij) W_ij: before a batch norm these cancel to 0, and rounding is no measure of itself.
    """
    differences = {}
    for layer in manifest.layout.layers:
        terms = gradients[layer.weight] * eager.state_dict()[layer.weight]
        scale = float(terms.abs().flatten(1).sum(1).max()) / layer.scale
        error = np.abs(got[MOMENTUM + layer.threshold] - gradients[layer.threshold].numpy()).max()
        differences[layer.threshold] = float(error) / max(scale, 1e-12)
    return differences


def _step(
    engine: Engine,
    eager: nn.Module,
    momenta: Momenta,
    active: Arrays,
    manifest: Manifest,
    batch: tuple[NDArray[np.float32], NDArray[np.int64]],
    h: Hyperparameters,
) -> dict[str, _Distances]:
    """Returns by tensor how far the engine, eager and float64 are from each other after one step; eager moves on."""
    engine.resume({**_tensors(eager, momenta, manifest), **active})
    exact = copy.deepcopy(eager).double(), {key: value.double() for key, value in momenta.items()}
    engine.step(*batch, h)
    x, y = torch.from_numpy(batch[0]), torch.from_numpy(batch[1])
    sgd_step(eager, momenta, x, y, h)
    sgd_step(*exact, x.double(), y, h)
    got, expected = engine.checkpoint(), _tensors(eager, momenta, manifest)
    truth = _tensors(*exact, manifest)
    return {
        key: _Distances(
            difference=_difference(got, expected, key),
            error=_difference(got, truth, key),
            rounding=_difference(expected, truth, key),
        )
        for key in expected
    }


def _difference(got: Arrays, expected: Arrays, name: str) -> float:
    scale = float(np.abs(expected[name]).max())
    if name.startswith(MOMENTUM):
        # a bias before a norm has a gradient of rounding alone, which is no measure of itself
        largest = max(
            float(np.abs(value).max()) for key, value in expected.items() if key.startswith(MOMENTUM)
        )
        scale = max(scale, 1e-3 * largest)
    return float(np.abs(got[name].astype(np.float64) - expected[name]).max()) / max(scale, 1e-12)


def _tensors(model: nn.Module, momenta: Momenta, manifest: Manifest) -> Arrays:
    values = model.state_dict()
    state = {tensor.name: values[tensor.name].numpy().copy() for tensor in manifest.state}
    return state | {MOMENTUM + key: value.numpy().copy() for key, value in momenta.items()}


def _kind(name: str, manifest: Manifest) -> str:
    if name.startswith(MOMENTUM):
        return "momentum"
    role = next(tensor.role for tensor in manifest.state if tensor.name == name)
    return {"threshold": "thresholds", "statistic": "statistics"}.get(role, "weights")


def _batch(
    manifest: Manifest, size: int, draw: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    x = draw.standard_normal((size, *manifest.input.shape), np.float32)
    return x, draw.integers(0, len(manifest.labels), size)


def show(found: list[Parity]) -> None:
    """Returns nothing; prints the table."""
    title = (
        f"largest relative difference from PyTorch eager in {len(BATCHES)} steps, whole and partial batches"
    )
    table = Table(title=title, title_justify="left")
    for column in ("model", "engine", "density", *KINDS, "eager's own"):
        table.add_column(column, justify="left" if column in ("model", "engine") else "right")
    for parity in found:
        table.add_row(
            parity.model,
            parity.engine,
            f"{parity.density:g}",
            *[f"{parity.difference[kind]:.1e}" if parity.difference[kind] else "0" for kind in KINDS],
            f"{parity.rounding:.1e}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
