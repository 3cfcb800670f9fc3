"""An ONNX file in figures: what it takes and returns, its layers with weights, and what they cost.

Nothing is run, and nothing outside the file is read: of data kept beside it only the size is looked at.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import onnx
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    shape_inference,
)

from export.inspected_file import MAX_MODEL_BYTES, Facts, InspectError, proof_beside, read_bounded

MAX_DEPTH = 64
"""Operators between what a file keeps of a weight and the layer that takes it."""
MAX_LAYERS = 10_000

# operator -> which of its inputs the weights are; the quantised ones of QOperator models among them
_WEIGHTS = {
    "Conv": 1,
    "ConvTranspose": 1,
    "FusedConv": 1,
    "ConvInteger": 1,
    "QLinearConv": 3,
    "Gemm": 1,
    "FusedGemm": 1,
    "QGemm": 3,
    "MatMul": 1,
    "FusedMatMul": 1,
    "MatMulInteger": 1,
    "QLinearMatMul": 3,
}
_FLOATS = frozenset({"float32", "float16", "bfloat16", "float64"})
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64", "uint8": "int8"}

Shape: TypeAlias = list[int | str | None]
"""A size that varies by its name, None where not even a name is known."""


def graph_facts(path: Path) -> Facts:
    """Returns what is to be known of the ONNX file at `path`; FLOPs are those of one example.

    Raises:
        InspectError: it is not ONNX, damaged, larger than 1 GiB, or keeps its data outside its folder.
    """
    data = read_bounded(path, MAX_MODEL_BYTES)
    model = _parsed(path, data)
    external = _external(path, model)
    proof, doubt = proof_beside(path, len(data))
    notes = [doubt] if doubt else []
    tensors = {tensor.name: tensor for tensor in model.graph.initializer} | _constants(model.graph)
    inputs = [value for value in model.graph.input if value.name not in tensors]
    described = {
        "kind": "onnx",
        "path": str(path),
        "bytes": len(data),
        "opset": _opsets(model),
        "ir_version": int(model.ir_version),
        "producer": f"{model.producer_name} {model.producer_version}".strip(),
        "inputs": [_value(value) for value in inputs],
        "outputs": [_value(value) for value in model.graph.output],
    }
    operators = dict(sorted(Counter(node.op_type for node in _nodes(model.graph)).items()))
    parameters = _parameters(model.graph, tensors)
    layers = _layers(model, tensors, notes)
    flops = [layer["flops"] for layer in layers]
    return {
        **described,
        "precision": _precision(layers, tensors),
        "layers": layers,
        "totals": {
            "parameters": parameters,
            "weights": sum(layer["weights"] or 0 for layer in layers),
            "flops": None if None in flops or not flops else sum(flops),
        },
        "operators": operators,
        "external_data": external,
        "proof": proof,
        "notes": notes,
    }


def _parsed(path: Path, data: bytes) -> ModelProto:
    """Returns the model in `data`, its tensors as long as their shapes say."""
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's DecodeError, whichever of its implementations raises it
        raise InspectError(f"{path} is not an ONNX model: {str(error).splitlines()[0][:120]}") from error
    if not model.graph.node or not model.opset_import:
        # protobuf takes many a text or picture for a message with unknown fields
        raise InspectError(f"{path} is not an ONNX model: it has no graph or no opset")
    _refuse_odd_text(path, model)
    for tensor in _tensors(model):
        if any(size < 0 for size in tensor.dims):
            raise InspectError(f"{path} is damaged: tensor {tensor.name!r:.80} has shape {list(tensor.dims)}")
        if tensor.data_location == TensorProto.EXTERNAL:
            continue
        if tensor.HasField("raw_data"):
            got, expected = len(tensor.raw_data), math.ceil(_elements(tensor) * _bits(tensor) / 8)
        else:
            # typed fields pack some dtypes several to a number: whether they are empty says enough
            fields = (tensor.float_data, tensor.int32_data, tensor.int64_data, tensor.double_data)
            got = sum(map(len, (*fields, tensor.uint64_data, tensor.string_data)))
            expected = got if got and _elements(tensor) <= 16 * got else _elements(tensor)
        if got != expected:
            raise InspectError(
                f"{path} is damaged: tensor {tensor.name!r:.80} of shape {list(tensor.dims)[:8]} holds {got:,} "
                f"{'bytes' if tensor.HasField('raw_data') else 'numbers'}, expected {expected:,}"
            )
    return model


def _refuse_odd_text(path: Path, model: ModelProto) -> None:
    """Returns nothing if every text in `model` is one: protobuf hands out what is not UTF-8 as bytes."""
    messages: list[Any] = [model]
    while messages:
        for field, value in messages.pop().ListFields():
            # by its value: how a field says it is repeated differs between protobuf's versions
            values = [value] if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value
            if field.type == field.TYPE_STRING and any(isinstance(text, bytes) for text in values):
                raise InspectError(f"{path} is damaged: {field.full_name} is not UTF-8")
            if field.type == field.TYPE_MESSAGE:
                messages.extend(values)


def _external(path: Path, model: ModelProto) -> list[Facts]:
    """Returns the files that tensors keep their data in, with their sizes, none opened.

    bytes is None where there is no such file: a bundle's graphs are given their weights by whoever runs them.
    """
    folder = path.parent.resolve()
    found = {}
    for tensor in _tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        name = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        if not name or "\0" in name or not (folder / name).resolve().is_relative_to(folder):
            raise InspectError(
                f"{path}: tensor {tensor.name!r:.80} keeps its data at {name!r:.120}, outside the model's folder: not "
                "followed. Do not load this file; ask whoever made it for one with its data inside"
            )
        file = folder / name
        found[name] = {"file": name, "bytes": file.stat().st_size if file.is_file() else None}
    return [found[name] for name in sorted(found)]


def _layers(model: ModelProto, tensors: dict[str, TensorProto], notes: list[str]) -> list[Facts]:
    """Returns the layers of `model` that have weights, in its order. Changes `model`: it is of no use afterwards."""
    shapes = _shapes(model, notes)
    made_by = {output: node for node in model.graph.node for output in node.output}
    varying = _varying(model.graph, tensors)
    layers: list[Facts] = []
    for node in model.graph.node:
        place = _WEIGHTS.get(node.op_type)
        if place is None or len(node.input) <= place or node.input[place] in varying:
            continue
        weight = _weight(node.input[place], made_by, tensors)
        if weight is None:
            continue
        tensor = tensors[weight]
        if len(layers) == MAX_LAYERS:
            notes.append(f"more than {MAX_LAYERS:,} layers: the others are left out")
            break
        attributes = {attribute.name: attribute for attribute in node.attribute}
        groups = int(attributes["group"].i) if "group" in attributes else 1
        shape = shapes.get(node.input[place], list(tensor.dims))
        known = [size for size in shape if isinstance(size, int)]
        weights = math.prod(known) if len(known) == len(shape) else None
        transposed = "transB" in attributes and attributes["transB"].i == 1
        layers.append(
            {
                "layer": node.name or node.output[0],
                "op": node.op_type,
                "weight": weight,
                "shape": shape,
                "dtype": _dtype(tensor.data_type),
                "groups": groups,
                "weights": weights,
                "flops": _flops(node, weights, shape, shapes, transposed),
            }
        )
    if not layers:
        notes.append("no layer has weights in this file: they are inputs, or there are none")
    if any(layer["flops"] is None for layer in layers):
        notes.append(
            "FLOPs are unknown where a shape depends on what is given, or on operators not of the standard"
        )
    return layers


def _flops(
    node: NodeProto, weights: int | None, shape: Shape, shapes: dict[str, Shape], transposed: bool
) -> int | None:
    """Returns the layer's FLOPs for one example, two per multiplication: what a proof counts."""
    if weights is None or weights == 0 or not shape:
        return weights
    if "Conv" in node.op_type:
        # each weight is used once per output position; a transposed convolution's, once per input position
        seen = shapes.get(node.input[0] if node.op_type == "ConvTranspose" else node.output[0])
        places = None if seen is None else seen[2:]
    else:
        seen = shapes.get(node.output[0])
        places = None if seen is None else seen[:-1]
    if places is None or not all(isinstance(size, int) for size in places):
        return None
    positions = math.prod(size for size in places if isinstance(size, int))
    if "MatMul" in node.op_type and len(shape) > 2:
        # weights of its own for every matrix: the batch is in both shapes
        positions = positions // max(1, math.prod(size for size in shape[:-2] if isinstance(size, int)))
    return 2 * weights * positions


def _varying(graph: GraphProto, tensors: dict[str, TensorProto]) -> set[str]:
    """Returns the values that depend on what the model is given."""
    varying = {value.name for value in graph.input if value.name not in tensors}
    for node in graph.node:
        inside = any(_subgraphs(attribute) for attribute in node.attribute)
        if inside or not varying.isdisjoint(node.input):
            varying.update(node.output)
    return varying


def _weight(name: str, made_by: dict[str, NodeProto], tensors: dict[str, TensorProto]) -> str | None:
    """Returns the tensor that `name`, which does not vary, is or is made of; None if it is of none."""
    for _ in range(MAX_DEPTH):
        if name in tensors:
            return name
        node = made_by.get(name)
        if node is None or not node.input:
            return None
        name = node.input[0]
    return None


def _constants(graph: GraphProto) -> dict[str, TensorProto]:
    """Returns the tensors that Constant operators hold, by the names of their outputs."""
    return {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant" and node.output
        for attribute in node.attribute
        if attribute.HasField("t")
    }


def _shapes(model: ModelProto, notes: list[str]) -> dict[str, Shape]:
    """Returns the shapes of all values at batch 1, as far as they follow from the standard's operators."""
    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = 1
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")  # they may name the batch that is 1 now
    del model.graph.value_info[:]
    for tensor in model.graph.initializer:
        if tensor.data_type != TensorProto.INT64 and _elements(tensor) > 1024:
            for field in ("raw_data", "float_data", "int32_data"):
                tensor.ClearField(field)  # shapes do not follow from weights: not copied again and again
    try:
        inferred = shape_inference.infer_shapes(model, strict_mode=False, data_prop=True)
    except Exception as error:  # InferenceError, RuntimeError, ValueError: for whatever it finds odd
        notes.append(f"shapes cannot be inferred: {str(error).splitlines()[0][:160]}")
        return {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    graph = inferred.graph
    shapes = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            shapes[value.name] = _shape(value)
    return shapes


def _parameters(graph: GraphProto, tensors: dict[str, TensorProto]) -> int:
    """Returns the numbers the model was trained for: all but constants of the graph, scales and zero points."""
    scales, data = set(), set()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scales.update(node.input[1:])
            if node.op_type == "DequantizeLinear":
                data.update(node.input[:1])
        elif node.op_type.startswith("QLinear") or node.op_type == "QGemm":
            bias = {"QLinearConv": 8, "QGemm": 6}.get(node.op_type)
            data.update({node.input[3], *([node.input[bias]] if bias and len(node.input) > bias else [])})
            scales.update(name for i, name in enumerate(node.input) if i not in (0, 3, bias))
        elif node.op_type in ("ConvInteger", "MatMulInteger"):
            data.update(node.input[1:2])
            scales.update(node.input[2:])
    return sum(
        _elements(tensor)
        for name, tensor in tensors.items()
        if name in data or (name not in scales and _dtype(tensor.data_type) in _FLOATS)
    )


def _precision(layers: list[Facts], tensors: dict[str, TensorProto]) -> str:
    """Returns what most weights are kept in: fp32, fp16, int8, or another dtype's name."""
    counts: Counter[str] = Counter()
    for layer in layers:
        counts[layer["dtype"]] += _elements(tensors[layer["weight"]])
    if not counts:
        return "unknown"
    dtype = counts.most_common(1)[0][0]
    return _SHORT.get(dtype, dtype)


def _value(value: ValueInfoProto) -> Facts:
    kind = value.type.tensor_type
    shape = _shape(value) if kind.HasField("shape") else None
    return {"name": value.name, "dtype": _dtype(kind.elem_type), "shape": shape}


def _shape(value: ValueInfoProto) -> Shape:
    return [
        int(dim.dim_value) if dim.HasField("dim_value") else _named(dim.dim_param)
        for dim in value.type.tensor_type.shape.dim
    ]


def _named(size: str) -> str | None:
    """Returns the name of a size that varies, None for one that shape inference made up."""
    return None if not size or size.startswith("unk__") else size


def _opsets(model: ModelProto) -> dict[str, int]:
    """Returns the version of each domain that has an operator here: some writers name every domain they know."""
    used = {node.domain for graph in (model.graph, *model.functions) for node in _nodes(graph)} | {""}
    return {
        entry.domain or "ai.onnx": int(entry.version)
        for entry in model.opset_import
        if entry.domain in used or entry.domain == "ai.onnx"
    }


def _dtype(number: int) -> str:
    """Returns numpy's name of an ONNX dtype, or ONNX's own where numpy has none."""
    names = {"float": "float32", "double": "float64"}
    try:
        name = str(TensorProto.DataType.Name(number)).lower()
    except ValueError:
        return f"dtype {number}"
    return names.get(name, name)


def _elements(tensor: TensorProto) -> int:
    return math.prod(tensor.dims)


def _bits(tensor: TensorProto) -> int:
    name = _dtype(tensor.data_type)
    if name in ("complex64", "complex128"):
        return int(name[7:])
    if name.startswith("float8"):
        return 8
    digits = "".join(filter(str.isdigit, name.partition("e")[0]))
    return int(digits) if digits else 8  # bool


def _tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yields every tensor of the model: initialisers and attributes, of subgraphs and functions too."""
    graphs = [model.graph]
    for function in model.functions:
        yield from _held(function.node, graphs)
    while graphs:
        graph = graphs.pop()
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield sparse.values
            yield sparse.indices
        yield from _held(graph.node, graphs)


def _held(nodes: Iterable[NodeProto], graphs: list[GraphProto]) -> Iterator[TensorProto]:
    """Yields the tensors in attributes of `nodes`; their subgraphs are added to `graphs`."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            graphs.extend(_subgraphs(attribute))


def _nodes(graph: GraphProto | FunctionProto) -> Iterator[NodeProto]:
    """Yields every node of a graph or function, those of subgraphs too."""
    graphs: list[GraphProto | FunctionProto] = [graph]
    while graphs:
        for node in graphs.pop().node:
            yield node
            for attribute in node.attribute:
                graphs.extend(_subgraphs(attribute))


def _subgraphs(attribute: Any) -> list[GraphProto]:
    return [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
