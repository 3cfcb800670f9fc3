"""A PyTorch function -> one plain ONNX graph of standard operators.

`make_fx` unrolls the function, backward pass and all, into core operators; `export.decompositions` says what becomes
of those that ONNX has no good form for.
"""

import logging
import operator
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import onnx
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel

from export.decompositions import TRANSLATIONS, LoweringError, Rewritten, decompositions
from spafl.step import ACTIVE

aten = torch.ops.aten

OPSET = 18
IR_VERSION = 8
"""The oldest that opset 18 allows, so that every onnxruntime since 1.17 loads the graphs."""

_MAY_TELL_LESS = ("MaxPool", "Dropout", "LayerNormalization", "BatchNormalization")
"""Operators whose later outputs may be left out."""

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
            quiet("torch.onnx", "torch.__trace", "onnx_ir", "onnxscript"),
        ):
            warnings.simplefilter("ignore")  # the tracer warns of its own internals
            axes = [symbols.get(name, {}) for name in inputs]
            traced = trace(function, list(inputs.values()), axes, decompositions())
            infer_sizes(traced.graph)
            _gather_columns_back(traced, list(inputs))
            dynamic = [
                dict.fromkeys(symbols.get(name, {}), torch.export.Dim.DYNAMIC) or None for name in inputs
            ]
            program = torch.export.export(
                FlatModule(traced),
                tuple(inputs.values()),
                dynamic_shapes={"values": tuple(dynamic)},
                strict=False,
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
        raise LoweringError(f"the model cannot be exported: {root_cause(error)}") from error
    if exported is None:
        raise LoweringError("the exporter returned nothing")
    return tidy(exported.model_proto, symbols)


def trace(
    function: Callable[..., tuple[Tensor, ...]],
    examples: Sequence[Tensor],
    symbolic: Sequence[Collection[int]],
    decompositions: Mapping[Any, Any],
) -> fx.GraphModule:
    """Returns the graph of `function`, backward pass and all; of each example only the `symbolic` axes vary."""
    # the others fixed from the start: to reason about them would take most of the time
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    fakes = [
        mode.from_tensor(value, symbolic_context=_sizes(value, axes))
        for value, axes in zip(examples, symbolic, strict=True)
    ]
    with sdpa_kernel(SDPBackend.MATH), Rewritten():
        traced = make_fx(function, dict(decompositions), tracing_mode="symbolic")(*fakes)
    drop_no_ops(traced)
    return traced


def _sizes(value: Tensor, axes: Collection[int]) -> StatelessSymbolicContext[Any, Any]:
    return StatelessSymbolicContext(
        dynamic_sizes=[DimDynamic.DUCK if axis in axes else DimDynamic.STATIC for axis in range(value.dim())]
    )


def root_cause(error: BaseException) -> str:
    """Returns the first line of the error at the bottom: the one that names the operation."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


class FlatModule(nn.Module):
    """One argument holding all inputs: torch.export wants fixed signatures, and ours vary with the model."""

    def __init__(self, traced: fx.GraphModule) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, *values: Tensor) -> Any:
        """Returns what the traced function returns."""
        return self.traced(*values)


def drop_no_ops(traced: fx.GraphModule) -> None:
    """Takes detaching and the like out of `traced`, and lets what writes in place return something new.

    Raises:
        LoweringError: an operation that writes into a view or an input.
    """
    for node in list(traced.graph.nodes):
        repeated = node.target is aten.expand.default and all(_broadcasts(node, user) for user in node.users)
        if repeated or node.target in _NO_OPS:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        elif node.target is aten.view.default:
            node.target = aten.reshape.default  # exporting refuses views of what transposes left behind
        elif isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            _write_elsewhere(node, node.target)
        elif node.target is aten.sub.Tensor and node.args[0] is node.args[1] and not node.kwargs:
            _drop_zero(node)
    traced.graph.eliminate_dead_code()
    traced.recompile()


def _write_elsewhere(node: fx.Node, target: torch._ops.OpOverload) -> None:
    """Makes `node` the operation that does not write in place; tracing lets what follows read its result anyway.

    Raises:
        LoweringError: there is none, or others see what it writes into: a view, or what has views, or an input.
    """
    into, name = node.all_input_nodes[0], target._schema.name.removeprefix("aten::").removesuffix("_")
    packet = getattr(aten, name, None)
    shared = any(_shares_memory(other) for other in (into, *into.users))
    if shared or packet is None or target._overloadname not in packet.overloads():
        raise LoweringError(
            f"{target} writes in place, which has no graph: replace that operation by one that returns its result"
        )
    source = node.all_input_nodes[-1]
    if packet is aten.copy and node.meta["val"].shape == source.meta["val"].shape:
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)
    else:
        node.target = getattr(packet, target._overloadname)


def _shares_memory(node: fx.Node) -> bool:
    """Returns whether `node` is an input, or a view of its argument."""
    if node.target is operator.getitem:
        return _shares_memory(node.all_input_nodes[0])
    return not isinstance(node.target, torch._ops.OpOverload) or any(
        result.alias_info is not None and not result.alias_info.is_write
        for result in node.target._schema.returns
    )


def _drop_zero(zero: fx.Node) -> None:
    """Takes `zero`, a number less itself, out of sums and products: what a straight-through gradient leaves behind."""
    for user in list(zero.users):
        if (
            user not in zero.users
            or user.kwargs
            or len(user.args) != 2
            or user.target not in (aten.add.Tensor, aten.mul.Tensor)
        ):
            continue
        other = user.args[0] if user.args[1] is zero else user.args[1]
        if not isinstance(other, fx.Node) or other.meta["val"].shape != zero.meta["val"].shape:
            continue
        product = user.target is aten.mul.Tensor
        user.replace_all_uses_with(zero if product else other)
        zero.graph.erase_node(user)
        if product:
            _drop_zero(zero)


def infer_sizes(graph: fx.Graph) -> None:
    """Writes one symbolic size of every new shape as -1, a computed one first: it needs no arithmetic then."""
    for node in graph.nodes:
        if node.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
            continue
        shape = list(node.args[1])
        symbolic = [axis for axis, size in enumerate(shape) if isinstance(size, fx.Node)]
        computed = [axis for axis in symbolic if shape[axis].target is not aten.sym_size.int]
        if symbolic and -1 not in shape:
            shape[(computed or symbolic)[-1]] = -1
        node.target, node.args = aten.reshape.default, (node.args[0], shape)


def _broadcasts(expanded: fx.Node, user: fx.Node) -> bool:
    """Returns whether `user` is a product with something of the expanded size: it then broadcasts by itself."""
    return user.target is aten.mul.Tensor and any(
        isinstance(factor, fx.Node)
        and factor is not expanded
        and factor.target is not aten.expand.default
        and factor.meta["val"].shape == expanded.meta["val"].shape
        for factor in user.args
    )


def _gather_columns_back(traced: fx.GraphModule, inputs: Sequence[str]) -> None:
    """Rewrites the gradient of a selection of active channels: gathered from the selected ones and a zero.

    What torch makes of it adds rows into zeros, which ONNX can only do along the first axis, between two transposes.
    """
    graph = traced.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    # only these indices are known to name no channel twice
    active = {node for node, name in zip(placeholders, inputs, strict=True) if name.startswith(ACTIVE)}
    for node in list(graph.nodes):
        if node.target is not aten.index_put.default or node.args[1][-1] not in active:
            continue
        zeros, (*whole, index), source = node.args[:3]
        if any(whole) or zeros.target is not aten.full.default or zeros.args[1] != 0:
            continue
        axis, rank = len(whole), zeros.meta["val"].dim()
        channels = zeros.args[0][axis]
        with graph.inserting_before(node):
            count = graph.call_function(aten.sym_size.int, (index, 0))
            order = graph.call_function(aten.arange.default, (count,))
            # a channel that is not selected finds the zero behind the last one that is
            nowhere = graph.call_function(aten.full.default, ([channels], count), {"dtype": torch.int64})
            places = graph.call_function(aten.scatter.src, (nowhere, 0, index, order))
            matrix = rank == 2 and axis == 1  # single numbers: faster as rows of the transposed matrix
            if matrix:
                source, axis = graph.call_function(aten.t.default, (source,)), 0
            padding = [0] * (2 * (rank - 1 - axis)) + [0, 1]
            padded = graph.call_function(aten.constant_pad_nd.default, (source, padding, 0.0))
            gathered = graph.call_function(aten.index_select.default, (padded, axis, places))
            if matrix:
                gathered = graph.call_function(aten.t.default, (gathered,))
        node.replace_all_uses_with(gathered)
        graph.erase_node(node)
    graph.eliminate_dead_code()
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
    used = {name for node in model.graph.node for name in node.input} | {
        value.name for value in model.graph.output
    }
    for node in model.graph.node:
        node.name = ""
        while node.op_type in _MAY_TELL_LESS and len(node.output) > 1 and node.output[-1] not in used:
            node.output.pop()  # a pool that need not tell its indices is faster
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
def quiet(*names: str) -> Iterator[None]:
    """Silences loggers for a while: the exporter reports its progress there."""
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
