"""The graph that ONNX Runtime Training differentiates: a model's training pass, from the batch to the objective."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from export.compact import CompactModel
from export.lowering import lower
from export.training import distinct_sizes, model_values
from spafl.manifest import StateTensor
from spafl.step import NEXT

OBJECTIVE = "objective"
IGNORED_LABEL = -100
"""As torch's cross_entropy has it."""

Nodes: TypeAlias = list[onnx.NodeProto]


def forward_model(
    model: nn.Module, tensors: tuple[StateTensor, ...], shape: tuple[int, ...]
) -> onnx.ModelProto:
    """Returns the graph to be differentiated by the trained tensors; `drop_stops` must follow.

    Inputs    x (batch, *shape), the state tensors, y (batch,) int64, coeff ()
    Outputs   loss (): mean task loss, correct () int64, objective (): loss + coeff * regulariser, next.<statistic>

    Raises:
        LoweringError: an operation that cannot be expressed.
    """
    compact = CompactModel(model, shape, dropped=lambda group: False, training=True)
    batch = next(distinct_sizes(model_values(compact).values(), shape))
    inputs = {"x": torch.zeros(batch, *shape)}
    inputs |= {tensor.name: torch.zeros(tensor.shape) for tensor in tensors}
    statistics = [tensor.name for tensor in tensors if not tensor.trained]
    thresholds = [tensor.name for tensor in tensors if tensor.role == "threshold"]

    def forward(*arguments: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(inputs, arguments, strict=True))
        with _Stopped():
            logits = compact.run_rows({tensor.name: named[tensor.name] for tensor in tensors}, named["x"])
        regulariser = torch.stack([torch.exp(-named[name]).sum() for name in thresholds]).sum()
        return (logits, regulariser, *(compact.statistics[name] for name in statistics))

    outputs = ["logits", "regulariser", *(NEXT + name for name in statistics)]
    lowered = lower(forward, inputs, outputs, {"x": {0: "batch"}})
    _convolve_averages(lowered)
    graph = lowered.graph
    # its gradient needs the second output
    cross_entropy = helper.make_node(
        "SoftmaxCrossEntropyLoss",
        ["logits", "y"],
        ["loss", "log.probabilities"],
        ignore_index=IGNORED_LABEL,
    )
    graph.node.extend(
        [
            cross_entropy,
            helper.make_node("Mul", ["regulariser", "coeff"], ["penalty"]),
            helper.make_node("Add", ["loss", "penalty"], [OBJECTIVE]),
            helper.make_node("ArgMax", ["logits"], ["guess"], axis=1, keepdims=0),
            helper.make_node("Equal", ["guess", "y"], ["right"]),
            helper.make_node("Cast", ["right"], ["right.number"], to=TensorProto.INT64),
            helper.make_node("ReduceSum", ["right.number"], ["correct"], keepdims=0),
        ]
    )
    graph.input.extend([value("y", ["batch"], TensorProto.INT64), value("coeff", [])])
    new = [value("loss", []), value("correct", [], TensorProto.INT64), value(OBJECTIVE, [])]
    new += [output for output in graph.output if output.name.startswith(NEXT)]
    del graph.output[:]
    graph.output.extend(new)
    for number, node in enumerate(graph.node):
        node.name = (
            f"node{number}"  # the optimiser there makes new names of these, and collides where they are empty
        )
    onnx.checker.check_model(lowered)
    return lowered


def drop_stops(graph: onnx.GraphProto) -> None:
    """Returns nothing; what `_Stopped` wrote for detach has become an identity: after the gradients, that is exact."""
    stops = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Cast" and helper.get_node_attr_value(node, "to") == TensorProto.UINT64
    }
    kept = [
        helper.make_node("Identity", [stops[node.input[0]]], node.output)
        if node.input and node.input[0] in stops
        else node
        for node in graph.node
        if node.output[0] not in stops
    ]
    del graph.node[:]
    graph.node.extend(kept)


def name_nodes(graph: onnx.GraphProto) -> None:
    """Returns nothing; all nodes are numbered: that runtime derives new names from theirs, and two of "" collide."""
    for number, node in enumerate(graph.node):
        node.name = f"node{number}"


def value(name: str, shape: Sequence[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """Returns the declaration of an input or output; float32 unless told."""
    return helper.make_tensor_value_info(name, kind, shape)


class _Stopped(TorchFunctionMode):
    """While tracing, `detach` is written as a cast to unsigned integers and back.

    Exporters drop detach as if it did nothing. The gradient builder stops at casts to integers; afterwards `drop_stops`
    takes them out, so what they would do to the numbers does not matter. Nothing else makes unsigned integers.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.detach, torch.detach):
            return args[0].to(torch.uint64).to(args[0].dtype)
        return func(*args, **(kwargs or {}))


def _convolve_averages(model: onnx.ModelProto) -> None:
    """Returns nothing; average pools have become convolutions of every channel by itself.

    The gradient of a pool takes its output's shape from the graph, where the batch has no size, and crashes.
    """
    graph = model.graph
    if not any(node.op_type == "AveragePool" for node in graph.node):
        return
    shapes = {
        info.name: [axis.dim_value for axis in info.type.tensor_type.shape.dim]
        for info in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    nodes: Nodes = []
    for node in graph.node:
        if node.op_type == "AveragePool":
            new, constants = _convolved(node, shapes[node.input[0]][1:])
            nodes += new
            graph.initializer.extend(constants)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _convolved(pool: onnx.NodeProto, shape: list[int]) -> tuple[Nodes, list[onnx.TensorProto]]:
    """Returns nodes and constants that do what an average pool does on (batch, *shape), shape (C, H, W)."""
    attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in pool.attribute}
    kernel = list(attributes["kernel_shape"])
    strides = list(attributes.get("strides", [1, 1]))
    dilations = list(attributes.get("dilations", [1, 1]))
    pads = list(attributes.get("pads", [0, 0, 0, 0]))
    channels, sizes = shape[0], shape[1:]
    counts: list[NDArray[np.int64]] = []
    for axis in (0, 1):
        begin, end = pads[axis], pads[axis + 2]
        reach = dilations[axis] * (kernel[axis] - 1) + 1
        room = sizes[axis] + begin + end - reach
        outputs = (-(-room // strides[axis]) if attributes.get("ceil_mode", 0) else room // strides[axis]) + 1
        if (outputs - 1) * strides[axis] >= sizes[axis] + begin:
            outputs -= 1  # a window must not start behind the input
        pads[axis + 2] = max((outputs - 1) * strides[axis] + reach - sizes[axis] - begin, 0)
        low, high = (0, sizes[axis] + begin + end)
        if not attributes.get("count_include_pad", 0):
            low, high = begin, sizes[axis] + begin
        at = np.arange(outputs)[:, None] * strides[axis] + np.arange(kernel[axis]) * dilations[axis]
        counts.append(((at >= low) & (at < high)).sum(1))
    shares = (1 / np.outer(*counts)).astype(np.float32)  # (H', W'): 1 / how many numbers each window averages
    out = pool.output[0]
    constants = {
        f"{out}.alone": np.array([-1, 1, *sizes]),
        f"{out}.kernel": np.ones((1, 1, *kernel), np.float32),
        f"{out}.shares": shares,
        f"{out}.together": np.array([-1, channels, *shares.shape]),
    }
    alone, ones, share, together = constants
    nodes = [
        helper.make_node("Reshape", [pool.input[0], alone], [f"{out}.inputs"]),
        helper.make_node(
            "Conv", [f"{out}.inputs", ones], [f"{out}.sums"], strides=strides, pads=pads, dilations=dilations
        ),
        helper.make_node("Mul", [f"{out}.sums", share], [f"{out}.averages"]),
        helper.make_node("Reshape", [f"{out}.averages", together], [out]),
    ]
    return nodes, [numpy_helper.from_array(array, name) for name, array in constants.items()]
