"""The proof that a compact model computes what the masked one does: its shape, and how it is made.

The same for every runtime and room: two models are run on the same real inputs, and then timed in turns.
"""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spafl.layout import Floats
from spafl.manifest import Compaction, Manifest
from spafl.record import Record
from spafl.rows import kept_filters, needed

PROOF = "proof.json"
MAX_EXAMPLES = 512
RELATIVE_TOLERANCE = 1e-5
"""Largest difference to the masked model, relative to its largest logit, that still counts as equal: float32 sums
of some thousand terms in another order differ by about 1e-6."""
WARM_UP = 5
"""Runs of each model that are not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerProof(Record):
    """What became of one layer: filters kept of total, and why."""

    layer: str
    kept: int
    total: int
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFigures(Record):
    """Size and speed of one model: file bytes, weights, FLOPs per example, latency in ms at batch 1."""

    bytes: int
    weights: int
    flops: int
    latency_median_ms: float
    latency_p95_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision(Record):
    """What float16 or int8 made of the compact model: the model file then is this one, and no longer equal.

    kind                  fp16 or int8
    examples              held-out ones with labels, on which all of this was measured
    calibration           other examples, from which int8's ranges were taken; 0: none were needed
    accuracy_before       of the compact model in float32, a share
    accuracy_after        of the converted one
    argmax_agreement      share of the examples on which both choose the same label
    relative_difference   largest difference of any logit, over the largest logit in float32
    """

    kind: str
    examples: int
    calibration: int
    accuracy_before: float
    accuracy_after: float
    argmax_agreement: float
    relative_difference: float
    bytes: int
    latency_median_ms: float
    latency_p95_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof(Record):
    """That the compact model computes what the masked one does, on `examples` real inputs.

    bundle                its id; None where the model was in none
    max_difference        largest absolute difference of any logit
    relative_difference   the same over the masked model's largest absolute logit
    argmax_agreement      share of examples on which both choose the same label
    equal                 relative_difference <= 1e-5 and argmax_agreement = 1, near-ties aside
    runtime               what ran the compact model, and its version
    multiple              which divides the filters that are kept, where there are enough
    precision             what float16 or int8 changed after that; None: nothing, the file is the compact model
    """

    bundle: str | None
    examples: int
    max_difference: float
    relative_difference: float
    argmax_agreement: float
    equal: bool
    density: dict[str, float]
    layers: tuple[LayerProof, ...]
    masked: ModelFigures
    compact: ModelFigures
    threads: int
    runtime: str
    multiple: int = 1
    precision: Precision | None = None

    def refusal(self) -> str:
        """Returns in words why a model that is not equal is not written."""
        return (
            f"the compact model differs from the masked one by {self.relative_difference:.1e} of its largest logit "
            f"(at most {RELATIVE_TOLERANCE:.0e} allowed), labels agree on {self.argmax_agreement:.1%}: not written. "
            "Please report this"
        )


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to compare: logits of any number of examples, logits of one as fast as it can, bytes of its file."""

    logits: Callable[[Floats], Floats]
    once: Callable[[Floats], object]
    bytes: int


def prove(
    manifest: Manifest,
    active: Mapping[str, NDArray[np.bool_]],
    examples: Floats,
    *,
    masked: Candidate,
    compact: Candidate,
    runtime: str,
    bundle: str | None = None,
    threads: int = 1,
    runs: int = 200,
    multiple: int = 1,
) -> Proof:
    """Returns the comparison of two models; whether they are equal is for the caller to look at.

    active     which filters (out,) of each masked layer are
    examples   (n, *shape) float32, n >= 1; at most the first 512 are used
    runs       of each model for its latency, in turns so that both meet the same machine
    multiple   what the compact model's widths were rounded up to
    """
    examples = examples[:MAX_EXAMPLES]
    got, expected = compact.logits(examples), masked.logits(examples)
    difference, largest = float(np.abs(got - expected).max()), float(np.abs(expected).max())
    relative = difference / max(largest, 1e-30)
    agreement = _agreement(got, expected, RELATIVE_TOLERANCE * largest)
    latency = latencies((masked.once, compact.once), examples, runs)
    kept = kept_filters(manifest.compaction, active, multiple)
    return Proof(
        bundle=bundle,
        examples=len(examples),
        max_difference=_finite(difference),
        relative_difference=_finite(relative),
        argmax_agreement=agreement,
        equal=relative <= RELATIVE_TOLERANCE and agreement == 1.0,
        density={name: float(rows.mean()) for name, rows in active.items()},
        layers=layer_proofs(manifest.compaction, active, multiple),
        masked=_figures(manifest.compaction, {}, masked.bytes, latency[0]),
        compact=_figures(manifest.compaction, kept, compact.bytes, latency[1]),
        threads=threads,
        runtime=runtime,
        multiple=multiple,
    )


def _finite(difference: float) -> float:
    """Returns `difference`, or the largest number where a model left the finite ones: JSON has no NaN."""
    return difference if math.isfinite(difference) else sys.float_info.max


def measure_precision(
    kind: str,
    examples: Floats,
    labels: NDArray[np.int64],
    *,
    compact: Candidate,
    converted: Candidate,
    calibration: int = 0,
    runs: int = 200,
) -> Precision:
    """Returns what converting the compact model cost and brought; whether that is too much is for the caller to say.

    examples   (n, *shape) float32, n >= 1, all of them used, with their labels (n,)
    runs       of each model for its latency, in turns so that both meet the same machine
    """
    got, expected = converted.logits(examples), compact.logits(examples)
    with np.errstate(invalid="ignore"):  # logits that are not finite make a difference that is not
        difference = float(np.abs(got - expected).max()) / max(float(np.abs(expected).max()), 1e-30)
    chosen, before = got.argmax(1), expected.argmax(1)
    _, latency = latencies((compact.once, converted.once), examples, runs)
    median, p95 = np.percentile(latency, [50, 95])
    return Precision(
        kind=kind,
        examples=len(examples),
        calibration=calibration,
        accuracy_before=float((before == labels).mean()),
        accuracy_after=float((chosen == labels).mean()),
        argmax_agreement=float((chosen == before).mean()),
        relative_difference=_finite(difference),
        bytes=converted.bytes,
        latency_median_ms=round(float(median), 4),
        latency_p95_ms=round(float(p95), 4),
    )


def _agreement(got: Floats, expected: Floats, allowed: float) -> float:
    """Returns the share of examples whose label agrees; where `allowed` decides between two, either is right.

    Not as close as the largest difference there is: by that measure every label agrees.
    """
    chosen = np.take_along_axis(expected, got.argmax(1)[:, None], 1)[:, 0]
    return float((expected.max(1) - chosen <= 2 * allowed).mean())


def latencies(models: Sequence[Callable[[Floats], object]], examples: Floats, runs: int) -> list[list[float]]:
    """Returns milliseconds of `runs` runs of each model, taken in turns so that both meet the same machine."""
    times: list[list[float]] = [[] for _ in models]
    for run in range(runs + WARM_UP):
        x = examples[run % len(examples)][None]
        for model, measured in zip(models, times, strict=True):
            start = time.perf_counter()
            model(x)
            measured.append((time.perf_counter() - start) * 1e3)
    return [measured[WARM_UP:] for measured in times]


def layer_proofs(
    compaction: Sequence[Compaction], active: Mapping[str, NDArray[np.bool_]], multiple: int = 1
) -> tuple[LayerProof, ...]:
    """Returns what becomes of each layer whose filters are `active` or not: how many stay, and why."""
    kept = kept_filters(compaction, active, multiple)
    proofs = []
    for entry in compaction:
        reason = entry.reason
        if entry.drops:
            reason = _why_kept(entry, kept[entry.layer], active) or reason
        proofs.append(
            LayerProof(
                layer=entry.layer, kept=kept.get(entry.layer, entry.out), total=entry.out, reason=reason
            )
        )
    return tuple(proofs)


def _why_kept(entry: Compaction, kept: int, active: Mapping[str, NDArray[np.bool_]]) -> str | None:
    """Returns why more filters are kept than are active, or fewer; None if it is as many."""
    used = needed(entry, active)
    count = int(used.sum())
    own = int(active[entry.layer].sum()) if entry.layer in active else entry.out
    if count == 0:
        return "no filter is needed: one is kept, because runtimes refuse empty layers"
    others = sorted({layer for layers in entry.live for layer in layers} - {entry.layer})
    reasons = []
    if count > own:
        reasons.append(f"{count - own} pruned ones stay: {', '.join(others)} needs their channels")
    elif count < own:
        reasons.append(
            f"{own - count} active ones go too: {', '.join(others)} makes nothing of their channels"
        )
    if kept > count and entry.blocks > 1:
        reasons.append(f"{kept - count} fill up: each of {entry.blocks} blocks keeps equally many")
    elif kept > count:
        reasons.append(f"{kept - count} fill up what the width was rounded to")
    return "; ".join(reasons) or None


def layer_costs(compaction: Sequence[Compaction], kept: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Returns weights and FLOPs per example of each layer while those in `kept` have so many filters, by layer."""
    costs = {}
    outs = {entry.layer: entry.out for entry in compaction}
    for entry in compaction:
        gone = {layer: outs[layer] - kept.get(layer, outs[layer]) for layer in entry.reads}
        columns = entry.n_in - sum(gone[layer] // entry.groups * each for layer, each in entry.reads.items())
        size = kept.get(entry.layer, entry.out) * columns
        costs[entry.layer] = size, 2 * size * entry.positions  # a multiplication and an addition each
    return costs


def _figures(
    compaction: Sequence[Compaction], kept: Mapping[str, int], bytes: int, latency: list[float]
) -> ModelFigures:
    costs = layer_costs(compaction, kept).values()
    median, p95 = np.percentile(latency, [50, 95])
    return ModelFigures(
        bytes=bytes,
        weights=sum(weights for weights, _ in costs),
        flops=sum(flops for _, flops in costs),
        latency_median_ms=round(float(median), 4),
        latency_p95_ms=round(float(p95), 4),
    )
