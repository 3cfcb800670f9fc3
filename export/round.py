"""`begin_round.onnx` and `end_round.onnx`: what happens to a device's state around its local steps.

The same mathematics as `spafl.algorithm`, as graphs, so that a client in any language holds none of it.
"""

from collections.abc import Mapping, Sequence
from functools import partial, reduce
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.channels import Group, Live
from export.lowering import OPSET, tidy
from spafl.algorithm import COLLAPSE_DENSITY
from spafl.layout import Layer, ThresholdLayout
from spafl.manifest import StateTensor
from spafl.step import ACTIVE, NEXT, ROWS


class GraphBuilder:
    """Nodes and constants of a graph in the making; calling it adds a node and returns its output's name."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._count = 0

    def __call__(self, operator: str, *inputs: str, out: str | None = None, **attributes: Any) -> str:
        """Returns the name of the (first) output of a new node; `out` chooses it."""
        self._count += 1
        out = out or f"{operator}_{self._count}"
        extra = [f"{out}.index"] if operator == "TopK" else []
        self.nodes.append(helper.make_node(operator, list(inputs), [out, *extra], **attributes))
        return out

    def constant(self, value: float | Sequence[int] | NDArray[Any]) -> str:
        """Returns the name of a constant: float32 of a float, int64 of integers, else as it is."""
        array = np.float32(value) if isinstance(value, float) else np.asarray(value)
        self._count += 1
        name = f"Constant_{self._count}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def model(
        self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """Returns the finished, checked model."""
        graph = helper.make_graph(self.nodes, name, list(inputs), list(outputs), self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
        return tidy(model, {})


def distance(add: GraphBuilder, layer: Layer, weight: str, threshold: str, rank: int) -> str:
    """Returns the name of score - tau (out,), float32."""
    axes = add.constant(list(range(1, rank)))
    score = add("ReduceMean", add("Abs", weight), axes, keepdims=0)
    if layer.scale != 1.0:
        score = add("Div", score, add.constant(float(layer.scale)))
    return add("Sub", score, threshold)


def mask(add: GraphBuilder, distance: str) -> str:
    """Returns the name of the mask (out,) as float32 0 or 1."""
    return add("Cast", add("Greater", distance, add.constant(0.0)), to=TensorProto.FLOAT)


def needed(add: GraphBuilder, live: Live, masks: Mapping[str, str]) -> str:
    """Returns the name of what `spafl.rows.needed` does (out,), as float32 0 or 1, given the layers' masks."""
    every = [reduce(partial(add, "Mul"), [masks[layer] for layer in sorted(layers)]) for layers in live]
    return reduce(partial(add, "Max"), sorted(every))


def staying_rows(
    add: GraphBuilder, needed: str, width: int, out: str, *, blocks: int = 1, multiple: str | None = None
) -> str:
    """Returns the name of what `spafl.rows.staying` does, (k,) int64.

    needed     name of (width,) float32, 0 or 1
    multiple   name of an int64 (1,)

    TopK, not NonZero or Compress: onnxruntime folds it by default when the weights are constants (checked: 1.17.3,
    1.19.2, 1.31.1), and its ties keep ascending order. At least one row, because runtimes refuse empty pools.
    """
    if blocks > 1:
        needed = add("Reshape", needed, add.constant([blocks, width // blocks]))
    count = add("ReduceSum", needed, add.constant([1 if blocks > 1 else 0]), keepdims=1)
    if blocks > 1:
        count = add("Reshape", add("ReduceMax", count, keepdims=0), add.constant([1]))
    count = add("Max", add("Cast", count, to=TensorProto.INT64), add.constant([1]))
    if multiple is not None:
        more = add("Sub", add("Add", count, multiple), add.constant([1]))
        count = add("Mul", add("Div", more, multiple), multiple)
        count = add("Min", count, add.constant([width // blocks]))
    ranked = add("TopK", needed, count, largest=1, sorted=1)
    if blocks == 1 and multiple is None:
        return add("Identity", f"{ranked}.index", out=out)
    # pruned ones that fill up came last: in ascending order, as everybody has them
    index = add("TopK", f"{ranked}.index", count, largest=0, sorted=1)
    if blocks > 1:
        starts = np.arange(blocks, dtype=np.int64)[:, None] * (width // blocks)
        index = add("Add", index, add.constant(starts))
    return add("Reshape", index, add.constant([-1]), out=out)


def begin_round_graph(
    layout: ThresholdLayout, tensors: tuple[StateTensor, ...], groups: Mapping[str, Group]
) -> onnx.ModelProto:
    """Returns the graph that catches a state up with the global thresholds and gathers its rows.

    groups   whose layers are in rows form, by name

    Inputs    base and target (size,): the global thresholds the state has caught up with, and the newest;
              each weight of a masked layer, and every tensor with rows
    Outputs   next.<weight>, next.<threshold> of each masked layer: caught up, thresholds of collapsed layers 0;
              active.<group> (k,) int64 and rows.<tensor>, of the layers in rows form;
              density (layers,) float32 after catching up, collapsed (layers,) bool, in layout order
    """
    add = GraphBuilder()
    by_name = {tensor.name: tensor for tensor in tensors}
    rows = [tensor for tensor in tensors if tensor.rows]
    outputs, densities, collapses, current = [], [], [], {}
    masks: dict[str, str] = {}
    in_rows = {layer for group in groups.values() for layer in group.layers}
    change = add("Sub", "target", "base")
    for layer in layout.layers:
        weight = by_name[layer.weight]
        bounds = [add.constant([edge]) for edge in (layer.offset, layer.offset + layer.out)]
        step = add(
            "Mul", add("Slice", change, *bounds), add.constant(float(np.float32(layer.scale / layer.n_scale)))
        )
        total = add("ReduceSum", layer.weight, add.constant(list(range(1, len(weight.shape)))), keepdims=0)
        step = add("Mul", add("Sign", total), step)
        column = add("Reshape", step, add.constant([layer.out, *[1] * (len(weight.shape) - 1)]))
        caught_up = add("Sub", layer.weight, column, out=f"{NEXT}{layer.weight}")
        target = add("Slice", "target", *bounds)
        before = mask(add, distance(add, layer, caught_up, target, len(weight.shape)))
        density = add("ReduceMean", before, keepdims=1)
        collapsed = add("LessOrEqual", density, add.constant(float(np.float32(COLLAPSE_DENSITY))))
        zeros = add.constant(np.zeros(layer.out, np.float32))
        threshold = add("Where", collapsed, zeros, target, out=f"{NEXT}{layer.threshold}")
        densities.append(density)
        collapses.append(collapsed)
        current[layer.weight] = caught_up
        outputs += [_float(caught_up, weight.shape), _float(threshold, (layer.out,))]
        if layer.name in in_rows:
            far = distance(add, layer, caught_up, threshold, len(weight.shape))
            masks[layer.name] = mask(add, far)
    for name, group in groups.items():
        # any of its layers: in training a channel counts that is active in one of them
        live = frozenset(frozenset([layer]) for layer in group.layers)
        active = f"{ACTIVE}{name}"
        staying_rows(add, needed(add, live, masks), group.width, active, blocks=group.blocks)
        outputs.append(_integer(active, (None,)))
    for tensor in rows:
        source = current.get(tensor.name, tensor.name)
        add("Gather", source, f"{ACTIVE}{tensor.layer}", axis=0, out=f"{ROWS}{tensor.name}")
        outputs.append(_float(f"{ROWS}{tensor.name}", (None, *tensor.shape[1:])))
    add("Concat", *densities, axis=0, out="density")
    add("Concat", *collapses, axis=0, out="collapsed")
    count = len(layout.layers)
    outputs += [_float("density", (count,)), _value("collapsed", TensorProto.BOOL, (count,))]
    weights = {layer.weight for layer in layout.layers}
    inputs = [_float("base", (layout.size,)), _float("target", (layout.size,))]
    inputs += [
        _float(tensor.name, tensor.shape) for tensor in tensors if tensor.rows or tensor.name in weights
    ]
    return add.model("begin_round", inputs, outputs)


def end_round_graph(layout: ThresholdLayout, tensors: tuple[StateTensor, ...]) -> onnx.ModelProto:
    """Returns the graph that puts trained rows back and lines up the thresholds to send.

    Inputs    as they are after the last step: each weight and threshold of a masked layer and each tensor with
              rows, whole (rows as begin_round's next.X or the state's X), rows.<tensor>, active.<layer>
    Outputs   next.<tensor> of every tensor with rows; thresholds (size,); density (layers,), in layout order
    """
    add = GraphBuilder()
    rows = [tensor for tensor in tensors if tensor.rows]
    outputs, current = [], {}
    for tensor in rows:
        index = add("Unsqueeze", f"{ACTIVE}{tensor.layer}", add.constant([1]))
        current[tensor.name] = add(
            "ScatterND", tensor.name, index, f"{ROWS}{tensor.name}", out=f"{NEXT}{tensor.name}"
        )
        outputs.append(_float(f"{NEXT}{tensor.name}", tensor.shape))
    add("Concat", *[layer.threshold for layer in layout.layers], axis=0, out="thresholds")
    ranks = {tensor.name: len(tensor.shape) for tensor in tensors}
    densities = []
    for layer in layout.layers:
        weight = current.get(layer.weight, layer.weight)
        far = distance(add, layer, weight, layer.threshold, ranks[layer.weight])
        densities.append(add("ReduceMean", mask(add, far), keepdims=1))
    add("Concat", *densities, axis=0, out="density")
    outputs += [_float("thresholds", (layout.size,)), _float("density", (len(layout.layers),))]
    masked = {name for layer in layout.layers for name in (layer.weight, layer.threshold)}
    inputs = [_float(tensor.name, tensor.shape) for tensor in tensors if tensor.rows or tensor.name in masked]
    inputs += [_float(f"{ROWS}{tensor.name}", (None, *tensor.shape[1:])) for tensor in rows]
    layers = dict.fromkeys(str(tensor.layer) for tensor in rows)
    inputs += [_integer(f"{ACTIVE}{layer}", (None,)) for layer in layers]
    return add.model("end_round", inputs, outputs)


def _value(name: str, dtype: int, shape: tuple[int | None, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def _float(name: str, shape: tuple[int | None, ...]) -> onnx.ValueInfoProto:
    return _value(name, TensorProto.FLOAT, shape)


def _integer(name: str, shape: tuple[int | None, ...]) -> onnx.ValueInfoProto:
    return _value(name, TensorProto.INT64, shape)
