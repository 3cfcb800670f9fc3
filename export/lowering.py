"""A PyTorch function -> one plain ONNX graph of standard operators.

`make_fx` unrolls the function, backward pass and all, into core operators; `export.decompositions` says what becomes
of those that ONNX has no good form for.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from export.decompositions import TRANSLATIONS, LoweringError, Rewritten, decompositions

aten = torch.ops.aten

OPSET = 18
IR_VERSION = 8
"""The oldest that opset 18 allows, so that every onnxruntime since 1.17 loads the graphs."""

_NO_OPS = (
    aten.detach.default,
    aten.detach_copy.default,
    aten.alias.default,
    aten.alias_copy.default,
    aten.lift_fresh_copy.default,
)


def lower(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    symbols: Mapping[str, Mapping[int, str]],
) -> onnx.ModelProto:
    """Returns the ONNX model of `function(*inputs.values())`, its inputs and outputs under the given names.

    symbols  by input, the names of its symbolic axes. Tracing tells sizes apart by their numbers: examples must give
             each symbol a size of its own that no fixed axis has.

    Raises:
        LoweringError: an operation that cannot be expressed; the message names it.
    """
    try:
        with (
            warnings.catch_warnings(),
            sdpa_kernel(SDPBackend.MATH),
            Rewritten(),
            _quiet("torch.onnx", "torch.__trace", "onnx_ir", "onnxscript"),
        ):
            warnings.simplefilter("ignore")  # the tracer warns of its own internals
            traced = make_fx(function, decomposition_table=decompositions(), tracing_mode="symbolic")(
                *inputs.values()
            )
            _drop_no_ops(traced)
            dynamic = [
                dict.fromkeys(symbols.get(name, {}), torch.export.Dim.DYNAMIC) or None for name in inputs
            ]
            program = torch.export.export(
                _Flat(traced), tuple(inputs.values()), dynamic_shapes={"values": tuple(dynamic)}, strict=False
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=list(inputs),
                output_names=list(outputs),
                optimize=True,  # safe: all parameters are inputs, so none can be folded away
                verbose=False,
                custom_translation_table=TRANSLATIONS,
            )
    except LoweringError:
        raise
    except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.UserError, NotImplementedError) as error:
        raise LoweringError(f"the model cannot be exported: {_root_cause(error)}") from error
    if exported is None:
        raise LoweringError("the exporter returned nothing")
    return tidy(exported.model_proto, symbols)


def _root_cause(error: BaseException) -> str:
    """Returns the first line of the error at the bottom: the one that names the operation."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0][:300]


class _Flat(nn.Module):
    """One argument holding all inputs: torch.export wants fixed signatures, and ours vary with the model."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, *values: Tensor) -> Any:
        """Returns what the traced function returns."""
        return self.traced(*values)


def _drop_no_ops(traced: fx.GraphModule) -> None:
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and node.target in _NO_OPS:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        elif node.op == "call_function" and node.target is aten.view.default:
            node.target = aten.reshape.default  # exporting refuses views of what transposes left behind
        elif isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise LoweringError(f"{node.target} writes in place, which has no graph: replace that operation")
    traced.graph.eliminate_dead_code()
    traced.recompile()


def tidy(model: onnx.ModelProto, symbols: Mapping[str, Mapping[int, str]]) -> onnx.ModelProto:
    """Returns `model` without metadata (146 kB become 17), of our IR version, with readable names for its axes."""
    model.ir_version = IR_VERSION
    model.doc_string = ""
    model.producer_name, model.producer_version = "spafl", ""
    for holder in (model, model.graph, *model.graph.node, *model.graph.input, *model.graph.output):
        del holder.metadata_props[:]
        holder.doc_string = ""
    del model.graph.value_info[:]
    del model.functions[:]
    for node in model.graph.node:
        node.name = ""
    for value in model.graph.input:
        for axis, name in symbols.get(value.name, {}).items():
            dimension = value.type.tensor_type.shape.dim[axis]
            dimension.ClearField("dim_value")
            dimension.dim_param = name
    for value in model.graph.output:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:  # traced names such as s3 mean nothing to a reader
                dimension.ClearField("dim_param")
    onnx.checker.check_model(model)
    return model


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silences loggers for a while: the exporter reports its progress there."""
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
