"""A compact model as other runtimes and budgets want it: float16, int8 or another opset, a plain ONNX file each time.

Needs the `onnx` package, which a device that only trains and compacts does not: it is imported when asked for.
"""

import importlib
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from device_runtime.engines.engine import EngineError
from device_runtime.engines.onnx import options, session
from device_runtime.examples import Examples
from spafl.layout import Floats
from spafl.manifest import InputSpec
from spafl.proof import Precision

if TYPE_CHECKING:
    from onnx import ModelProto

CALIBRATION = 512
"""Training examples int8's ranges are taken from, at most: more hardly widen them."""
MAX_DROP = 0.02
"""Share of held-out examples whose accuracy a conversion may cost, unless told otherwise."""
_BATCH = 64
# What has weights, and what only moves or compares numbers and so stays int8 between them. Norms, softmax and products
# of activations in int8 too cost an untrained ViT a tenth of its labels, and twice the time.
_QUANTISED = (
    *("Conv", "Gemm", "MatMul", "Relu", "MaxPool", "AveragePool", "GlobalAveragePool"),
    *("Concat", "Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze"),
)


@dataclass(frozen=True, slots=True)
class Conversion:
    """What a compact model is turned into, and the examples on which that is measured.

    kind          fp32 leaves the numbers as they are
    opset         of the file; None: as the bundle's graphs are
    labels        (n,) of the examples the proof is made on; fp16 and int8 need them
    calibration   (m, *shape) float32: other examples, from which int8 takes its ranges; at most the first 512 are used
    max_drop      accuracy that may be lost, a share
    """

    kind: Literal["fp32", "fp16", "int8"] = "fp32"
    opset: int | None = None
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    calibration: Floats = field(default_factory=lambda: np.zeros(0, np.float32))
    max_drop: float = MAX_DROP

    @property
    def option(self) -> str | None:
        """Returns what asks for it on the command line; None where the compact model stays as it is."""
        if self.kind == "fp32":
            return None if self.opset is None else "--opset"
        return f"--{self.kind}"

    def require(self) -> None:
        """Returns nothing if what it needs is installed: to be asked before any work is begun.

        Raises:
            EngineError: the package onnx is not.
        """
        if self.option is None:
            return
        try:
            importlib.import_module("onnx")
        except ImportError as error:
            raise EngineError(
                f"{self.option} needs the package onnx, which is not installed: pip install onnx"
            ) from error

    def on(self, examples: Examples, train: Examples, spec: InputSpec, seed: int) -> "Conversion":
        """Returns this conversion with the labels of `examples`, and calibration examples drawn from `train`."""
        drawn = np.random.default_rng(seed).permutation(len(train))[:CALIBRATION]
        calibration = train.take(drawn).inputs(spec) if self.kind == "int8" else self.calibration
        return replace(self, labels=examples.y, calibration=calibration)

    def check(self, examples: int) -> None:
        """Returns nothing if it can be made and measured on so many examples.

        Raises:
            EngineError: as `require`, or labels or calibration examples are missing.
        """
        self.require()
        if self.kind != "fp32" and len(self.labels) != examples:
            raise EngineError(
                f"{self.option} is measured by accuracy: got {len(self.labels)} labels for {examples} examples"
            )
        if self.kind == "int8" and not len(self.calibration):
            raise EngineError(f"{self.option} takes its ranges from training examples, got none")

    @property
    def calibrated_on(self) -> int:
        """Returns how many examples int8's ranges are taken from; 0 where none are needed."""
        return min(len(self.calibration), CALIBRATION) if self.kind == "int8" else 0

    def refuse_loss(self, precision: Precision, out: Path) -> None:
        """Returns nothing if `precision` costs no more accuracy than may be lost.

        Raises:
            EngineError: it costs more, or logits are not finite; `out` is where nothing is replaced then.
        """
        if precision.relative_difference == sys.float_info.max:  # a proof's word for what is no number
            raise EngineError(
                f"in {self.kind} this model's logits are not finite, its numbers are too large for that: nothing is "
                f"written, what is in {out} stays. Leave --{self.kind} out"
            )
        lost = precision.accuracy_before - precision.accuracy_after
        if lost > self.max_drop + 1e-9:
            raise EngineError(
                f"{self.kind} costs {lost * 100:.1f} points of accuracy ({precision.accuracy_before:.1%} => "
                f"{precision.accuracy_after:.1%} of {precision.examples} held-out examples), at most "
                f"{self.max_drop * 100:g} may be lost: nothing is written, what is in {out} stays. Allow it with "
                f"--max-drop, or leave --{self.kind} out"
            )


def converted(model: bytes, conversion: Conversion) -> bytes:
    """Returns `model` in the numbers that `conversion` is of.

    Raises:
        EngineError: onnxruntime's tools cannot convert it, or the result is no valid model.
    """
    try:
        return to_int8(model, conversion.calibration) if conversion.kind == "int8" else to_float16(model)
    except EngineError:
        raise
    except Exception as error:  # the tools raise whatever happens in them
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise EngineError(
            f"this model cannot be had in {conversion.kind} ({reason}): leave it in fp32"
        ) from error


def at_opset(model: bytes, opset: int) -> bytes:
    """Returns `model` with every operator as `opset` of the standard defines it.

    Raises:
        EngineError: an operator has no such form; the message names the lowest opset the model can be had in.
    """
    import onnx
    from onnx import version_converter

    newest = onnx.defs.onnx_opset_version()
    if not 1 <= opset <= newest:
        raise EngineError(
            f"--opset {opset}: expected 1 to {newest}, which is what onnx {onnx.__version__} knows"
        )

    def convert(version: int) -> "ModelProto":
        made = version_converter.convert_version(parsed, version)
        onnx.checker.check_model(made, full_check=True)
        return made

    parsed = _parsed(model)
    try:
        made = _bytes(convert(opset))
    except Exception as error:  # the converter raises RuntimeError and its own, the checker others
        reason = str(error).rpartition("failed: ")[2].splitlines()[0][:200]
    else:
        try:
            session(made, options(1, spinning=False))
        except EngineError as error:
            raise EngineError(
                f"onnxruntime {ort.__version__} does not run this model in opset {opset}: choose a lower one"
            ) from error
        return made
    current = _opset(parsed)
    for version in range(opset + 1, current):
        try:
            convert(version)
        except Exception:
            continue
        raise EngineError(
            f"this model cannot be had in opset {opset} ({reason}): {version} is the lowest it can be"
        )
    raise EngineError(f"this model cannot be had in opset {opset} ({reason}): leave it at {current}")


def to_float16(model: bytes) -> bytes:
    """Returns `model` with weights and computation in float16; what goes in and comes out stays float32.

    Raises:
        EngineError: the result is no valid model.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    parsed = _parsed(model)
    made = ONNXModel(convert_float_to_float16(_parsed(model), keep_io_types=True))
    made.topological_sort()  # the casts of the inputs were appended at the end, which the standard forbids
    return _checked(made.model, parsed)


def to_int8(model: bytes, calibration: Floats) -> bytes:
    """Returns `model` with layers' weights and inputs in int8: QuantizeLinear and DequantizeLinear around them.

    Weights have a scale per channel; both are signed, which x86-64 and ARM64 run without saturation.

    calibration   (m, *shape) float32, m >= 1: examples that the activations' ranges are taken from

    Raises:
        EngineError: the result is no valid model.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.quant_utils import add_pre_process_metadata

    class Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
        def __init__(self) -> None:
            self._rest = _batches(calibration[:CALIBRATION])

        def get_next(self) -> dict[str, Floats] | None:
            return next(self._rest, None)

    parsed = _parsed(model)
    if _opset(parsed) < 13:
        raise EngineError(
            f"--int8 with a scale per channel needs opset 13 or later, got --opset {_opset(parsed)}"
        )
    shaped = onnx.shape_inference.infer_shapes(parsed)
    add_pre_process_metadata(shaped)  # true: it is folded and fused; without it a warning asks for that
    for node in shaped.graph.node:
        node.name = node.name or node.output[0]  # nodes are excluded by name, and onnxruntime saves none
    with tempfile.TemporaryDirectory(prefix="spafl-") as folder:
        out = Path(folder) / "int8.onnx"
        quantize_static(
            shaped,
            out,
            Batches(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(_QUANTISED),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_products(shaped),
        )
        made = onnx.load_model_from_string(out.read_bytes())
    del made.metadata_props[:]
    made.metadata_props.extend(parsed.metadata_props)
    return _checked(made, parsed)


def _products(model: "ModelProto") -> list[str]:
    """Returns the names of the products that have no weights: both factors depend on the example."""
    weights = {tensor.name for tensor in model.graph.initializer}
    nodes = (node for node in model.graph.node if node.op_type in ("MatMul", "Gemm"))
    return [node.name for node in nodes if node.input[1] not in weights]


def _batches(examples: Floats) -> Iterator[dict[str, Floats]]:
    for start in range(0, len(examples), _BATCH):
        yield {"x": examples[start : start + _BATCH]}


def _parsed(model: bytes) -> "ModelProto":
    import onnx

    parsed = onnx.load_model_from_string(model)
    # onnxruntime names every domain it knows when it saves, and converters take each for used
    used = [
        entry for entry in parsed.opset_import if entry.domain in {node.domain for node in parsed.graph.node}
    ]
    del parsed.opset_import[:]
    parsed.opset_import.extend(used)
    return parsed


def _opset(model: "ModelProto") -> int:
    return max(int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _bytes(model: "ModelProto") -> bytes:
    serialized: bytes = model.SerializeToString()
    return serialized


def _checked(model: "ModelProto", before: "ModelProto") -> bytes:
    """Returns the file of `model`, made of `before`: it takes and returns the same."""
    import onnx

    for value, own in zip(model.graph.output, before.graph.output, strict=True):
        value.CopyFrom(own)  # shape inference gave sizes that vary names of its own
    del model.graph.value_info[:]  # for the converter; a runtime infers shapes itself
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # ValidationError and InferenceError share no base
        raise EngineError(
            f"the converted model is not valid ONNX: {str(error).splitlines()[0][:200]}"
        ) from error
    return _bytes(model)
