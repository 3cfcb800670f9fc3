"""A device's own weights -> a physically small model, and the proof that it computes the same.

onnxruntime does the cutting: `infer.onnx` selects the active channels of the weights it is given, constant folding
does that once, and what is saved afterwards holds only what is left. No torch, no protobuf, any language's runtime.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from device_runtime.conversion import Conversion, at_opset, converted
from device_runtime.engines.engine import EngineError
from device_runtime.engines.onnx import logits, options, session, supply_state
from spafl.algorithm import mask_of
from spafl.bundle import Bundle, check_state
from spafl.layout import Floats
from spafl.proof import PROOF, Candidate, Proof, latencies, measure_precision, prove
from spafl.rows import infer_graph

MODEL = "model.onnx"
UNCONVERTED = Conversion()
MULTIPLES = (1, 4, 8, 16)
"""Of channels: what ARM's and x86's vector units take at a time."""
FASTER = 0.97
"""Of the time: a wider model has to be this much faster to be worth its bytes."""


def compact(
    bundle: Bundle,
    state: Mapping[str, Floats],
    out: Path,
    examples: Floats,
    *,
    conversion: Conversion = UNCONVERTED,
    threads: int = 1,
    runs: int = 200,
    multiple: int = 1,
) -> Proof:
    """Returns the proof for the compact model written to `out`/model.onnx, with the proof as `out`/proof.json.

    examples     (n, *shape) float32, n >= 1: real inputs to compare both models on; at most the first 512 are used
    conversion   what the compact model is turned into, once it is proven: that is what is written then
    runs         of each model for its latency
    multiple     keep as many filters of a layer as this divides, pruned ones as zeros: runtimes compute lanes full

    Raises:
        BundleError: the state is not one of this bundle's model.
        EngineError: no examples, the compact model differs from the masked one, cannot be converted, or loses more
            accuracy by that than it may; what is in `out` stays as it was.
    """
    conversion.check(len(examples))
    manifest = bundle.manifest
    check_state(manifest, state)
    if len(examples) == 0:
        raise EngineError("a proof needs at least one real example, got none: give --data")
    out.mkdir(parents=True, exist_ok=True)
    small, whole, told = out / f"{MODEL}.part", out / "masked.part", out / f"{PROOF}.part"
    other = out / "converted.part"
    try:
        graphs = bundle.manifest.engines["onnx"].files
        _save(*infer_graph(bundle.read(graphs["infer"]), manifest, state, multiple), small, threads)
        _save(bundle.read(graphs["masked"]), state, whole, threads)
        if conversion.opset is not None:
            small.write_bytes(at_opset(small.read_bytes(), conversion.opset))
        proof = prove(
            manifest,
            mask_of(manifest.layout, state),
            examples,
            masked=_candidate(whole, threads),
            compact=_candidate(small, threads),
            runtime=f"onnxruntime {ort.__version__}",
            bundle=bundle.id,
            threads=threads,
            runs=runs,
            multiple=multiple,
        )
        if not proof.equal:
            raise EngineError(proof.refusal())
        if conversion.kind != "fp32":
            other.write_bytes(converted(small.read_bytes(), conversion))
            precision = measure_precision(
                conversion.kind,
                examples,
                conversion.labels,
                compact=_candidate(small, threads),
                converted=_candidate(other, threads),
                calibration=conversion.calibrated_on,
                runs=runs,
            )
            conversion.refuse_loss(precision, out)
            proof = dataclasses.replace(proof, precision=precision)
            other.replace(small)
        told.write_text(proof.to_text(indent=2) + "\n")
        told.replace(out / PROOF)
        small.replace(out / MODEL)
    finally:
        for part in (small, whole, other, told):
            part.unlink(missing_ok=True)
    return proof


def fastest_multiple(
    bundle: Bundle, state: Mapping[str, Floats], examples: Floats, *, threads: int = 1, runs: int = 100
) -> int:
    """Returns which of MULTIPLES makes the fastest compact model on this machine, the smaller one of two alike.

    Raises:
        BundleError: the state is not one of this bundle's model.
        EngineError: no examples.
    """
    check_state(bundle.manifest, state)
    if len(examples) == 0:
        raise EngineError("a measurement needs at least one real example, got none: give --data")
    graph = bundle.read(bundle.manifest.engines["onnx"].files["infer"])
    models = []
    with TemporaryDirectory(prefix="spafl-compact-") as folder:
        for multiple in MULTIPLES:
            path = Path(folder) / f"{multiple}.onnx"
            _save(*infer_graph(graph, bundle.manifest, state, multiple), path, threads)
            models.append(_candidate(path, threads))
    times = [median(measured) for measured in latencies([model.once for model in models], examples, runs)]
    best = 0
    for number, time in enumerate(times):
        if time < FASTER * times[best]:
            best = number
    return MULTIPLES[best]


def predict(model: Path, x: Floats, *, threads: int = 1) -> Floats:
    """Returns logits (n, labels) of a compact model file for x (n, *shape) float32.

    Raises:
        EngineError: no model there, or onnxruntime refuses it.
    """
    if not model.is_file():
        raise EngineError(f"no model at {model}: make one with `spafl device compact`")
    return logits(session(str(model), options(threads, spinning=False)), x)


def _save(graph: bytes, supplied: Mapping[str, NDArray[Any]], path: Path, threads: int) -> None:
    """Writes a graph of a bundle with what is `supplied` worked in, everything constant folded."""
    chosen = options(threads, spinning=False)
    # BASIC folds everything and writes standard operators only; higher levels bake in this runtime, or this CPU
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    chosen.optimized_model_filepath = str(path)
    held = supply_state(chosen, supplied)
    session(graph, chosen)
    del held  # not before: the session reads it


def _candidate(path: Path, threads: int) -> Candidate:
    model = session(str(path), options(threads, spinning=False))
    return Candidate(
        logits=lambda x: logits(model, x),
        once=lambda x: model.run(["logits"], {"x": x}),
        bytes=path.stat().st_size,
    )
