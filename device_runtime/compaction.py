"""A device's own weights -> a physically small model, and the proof that it computes the same.

onnxruntime does the cutting: `infer.onnx` selects the active channels of the weights it is given, constant folding
does that once, and what is saved afterwards holds only what is left. No torch, no protobuf, any language's runtime.
"""

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from device_runtime.engines.engine import EngineError
from device_runtime.engines.onnx import logits, options, session, supply_state
from spafl import algorithm
from spafl.bundle import Bundle, check_state
from spafl.layout import Floats
from spafl.manifest import Manifest

MODEL, PROOF = "model.onnx", "proof.json"
MAX_EXAMPLES = 512
RELATIVE_TOLERANCE = 1e-5
"""Largest difference to the masked model, relative to its largest logit, that still counts as equal: float32 sums
of some thousand terms in another order differ by about 1e-6."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class LayerProof(_Frozen):
    """What became of one layer: filters kept of total, and why."""

    layer: str
    kept: int
    total: int
    reason: str


class ModelFigures(_Frozen):
    """Size and speed of one model: file bytes, weights, FLOPs per example, latency in ms at batch 1."""

    bytes: int
    weights: int
    flops: int
    latency_median_ms: float
    latency_p95_ms: float


class Proof(_Frozen):
    """That the compact model computes what the masked one does, on `examples` real inputs.

    max_difference        largest absolute difference of any logit
    relative_difference   the same over the masked model's largest absolute logit
    argmax_agreement      share of examples on which both choose the same label
    equal                 relative_difference <= 1e-5 and argmax_agreement = 1, near-ties aside
    """

    bundle: str
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
    onnxruntime: str


def compact(
    bundle: Bundle,
    state: Mapping[str, Floats],
    out: Path,
    examples: Floats,
    *,
    threads: int = 1,
    runs: int = 200,
) -> Proof:
    """Returns the proof for the compact model written to `out`/model.onnx, with the proof as `out`/proof.json.

    examples  (n, *shape) float32, n >= 1: real inputs to compare both models on; at most the first 512 are used
    runs      of each model for its latency

    Raises:
        BundleError: the state is not one of this bundle's model.
        EngineError: no examples, or the compact model differs from the masked one; nothing is left in `out` then.
    """
    manifest = bundle.manifest
    check_state(manifest, state)
    if len(examples) == 0:
        raise EngineError("a proof needs at least one real example, got none: give --data")
    examples = examples[:MAX_EXAMPLES]
    out.mkdir(parents=True, exist_ok=True)
    small, whole, told = out / f"{MODEL}.part", out / "masked.part", out / f"{PROOF}.part"
    try:
        _save(bundle, "infer", state, small, threads)
        _save(bundle, "masked", state, whole, threads)
        models = [session(str(path), options(threads, spinning=False)) for path in (small, whole)]
        got, expected = (logits(model, examples) for model in models)
        difference = float(np.abs(got - expected).max())
        relative = difference / max(float(np.abs(expected).max()), 1e-30)
        agreement = _agreement(got, expected, difference)
        latencies = _latencies(models, examples, runs)
        active = {layer.name: algorithm.mask(layer, state) for layer in manifest.layout.layers}
        kept = _kept(manifest, active)
        proof = Proof(
            bundle=bundle.id,
            examples=len(examples),
            max_difference=difference,
            relative_difference=relative,
            argmax_agreement=agreement,
            equal=relative <= RELATIVE_TOLERANCE and agreement == 1.0,
            density={name: float(rows.mean()) for name, rows in active.items()},
            layers=_layer_proofs(manifest, active, kept),
            masked=_figures(manifest, {}, whole, latencies[1]),
            compact=_figures(manifest, kept, small, latencies[0]),
            threads=threads,
            onnxruntime=ort.__version__,
        )
        if not proof.equal:
            raise EngineError(
                f"the compact model differs from the masked one by {relative:.1e} of its largest logit (at most "
                f"{RELATIVE_TOLERANCE:.0e} allowed), labels agree on {agreement:.1%}: not written. Please report this"
            )
        told.write_text(proof.model_dump_json(indent=2) + "\n")
        told.replace(out / PROOF)
        small.replace(out / MODEL)
    finally:
        for part in (small, whole, told):
            part.unlink(missing_ok=True)
    return proof


def predict(model: Path, x: Floats, *, threads: int = 1) -> Floats:
    """Returns logits (n, labels) of a compact model file for x (n, *shape) float32.

    Raises:
        EngineError: no model there, or onnxruntime refuses it.
    """
    if not model.is_file():
        raise EngineError(f"no model at {model}: make one with `spafl device compact`")
    return logits(session(str(model), options(threads, spinning=False)), x)


def _save(bundle: Bundle, role: str, state: Mapping[str, Floats], path: Path, threads: int) -> None:
    """Writes a graph of the bundle with `state` worked in, everything constant folded."""
    chosen = options(threads, spinning=False)
    # BASIC folds everything and writes standard operators only; higher levels bake in this runtime, or this CPU
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    chosen.optimized_model_filepath = str(path)
    held = supply_state(chosen, state)
    session(bundle.read(bundle.manifest.engines["onnx"].files[role]), chosen)
    del held  # not before: the session reads it


def _agreement(got: Floats, expected: Floats, difference: float) -> float:
    """Returns the share of examples whose label agrees; where two labels are closer than rounding, either is right."""
    chosen = np.take_along_axis(expected, got.argmax(1)[:, None], 1)[:, 0]
    return float((expected.max(1) - chosen <= 2 * difference).mean())


def _latencies(models: list[ort.InferenceSession], examples: Floats, runs: int) -> list[list[float]]:
    """Returns milliseconds of `runs` runs of each model, taken in turns so that both meet the same machine."""
    times: list[list[float]] = [[] for _ in models]
    for run in range(runs + 5):
        x = {"x": examples[run % len(examples)][None]}
        for model, measured in zip(models, times, strict=True):
            start = time.perf_counter()
            model.run(["logits"], x)
            measured.append((time.perf_counter() - start) * 1e3)
    return [measured[5:] for measured in times]


def _kept(manifest: Manifest, active: Mapping[str, NDArray[np.bool_]]) -> dict[str, int]:
    """Returns how many filters each layer that drops keeps: its active ones, at least one."""
    return {
        entry.layer: max(1, int(active[entry.layer].sum())) for entry in manifest.compaction if entry.drops
    }


def _layer_proofs(
    manifest: Manifest, active: Mapping[str, NDArray[np.bool_]], kept: Mapping[str, int]
) -> tuple[LayerProof, ...]:
    proofs = []
    for entry in manifest.compaction:
        reason = entry.reason
        if entry.drops and not active[entry.layer].any():
            reason = "no filter is active: one is kept, as zeros, because runtimes refuse empty layers"
        proofs.append(
            LayerProof(
                layer=entry.layer, kept=kept.get(entry.layer, entry.out), total=entry.out, reason=reason
            )
        )
    return tuple(proofs)


def _figures(manifest: Manifest, kept: Mapping[str, int], model: Path, latency: list[float]) -> ModelFigures:
    weights = flops = 0
    outs = {entry.layer: entry.out for entry in manifest.compaction}
    for entry in manifest.compaction:
        columns = entry.n_in
        if entry.reads is not None and entry.reads in kept:
            columns = columns * kept[entry.reads] // outs[entry.reads]
        size = kept.get(entry.layer, entry.out) * columns
        weights += size
        flops += 2 * size * entry.positions  # a multiplication and an addition each
    median, p95 = np.percentile(latency, [50, 95])
    return ModelFigures(
        bytes=model.stat().st_size,
        weights=weights,
        flops=flops,
        latency_median_ms=round(float(median), 4),
        latency_p95_ms=round(float(p95), 4),
    )
