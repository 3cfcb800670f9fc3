"""`infer.onnx` and `masked.onnx`: one forward pass whose weights the device supplies.

Both hold their weights as external initialisers without data. `infer.onnx` selects the active channels in the graph;
a runtime that folds constants does so once, when it loads the model, and what it saves is physically small.
`masked.onnx` is the model as PyTorch has it, whole and masked: what the small one is proven against.
"""

import copy

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from export.compact import CompactModel
from export.decompositions import LoweringError
from export.lowering import lower, tidy
from export.round import GraphBuilder, distance, mask, needed, staying_rows
from export.training import distinct_sizes, model_values
from spafl.layout import ThresholdLayout
from spafl.manifest import StateTensor
from spafl.rows import MULTIPLE
from spafl.step import ACTIVE, ROWS

EXTERNAL = "state"
"""Where the initialisers claim their data is; no such file exists, so a runtime that is given none must fail."""


def infer_graph(
    compact: CompactModel, layout: ThresholdLayout, tensors: tuple[StateTensor, ...], shape: tuple[int, ...]
) -> onnx.ModelProto:
    """Returns the self-compacting graph of a model rewired for inference.

    Inputs    x (batch, *shape) float32
    Outputs   logits (batch, labels)
    External initialisers: the state tensors under their own names; `MULTIPLE` (1,) int64 if anything can be left out
    """
    sizes = distinct_sizes(model_values(compact).values(), shape)
    batch = next(sizes)
    inputs: dict[str, Tensor] = {"x": torch.zeros(batch, *shape)}
    symbols = {"x": {0: "batch"}}
    for name, group in compact.dropped.items():
        # equally many in each block: a multiple
        inputs[f"{ACTIVE}{name}"] = torch.arange(next(sizes) * group.blocks)
        symbols[f"{ACTIVE}{name}"] = {0: f"{ROWS}{name}"}
    inputs |= {tensor.name: torch.zeros(tensor.shape) for tensor in tensors}

    def forward(*arguments: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(inputs, arguments, strict=True))
        compact.active = {layer: named[f"{ACTIVE}{layer}"] for layer in compact.dropped}
        return (compact.run({tensor.name: named[tensor.name] for tensor in tensors}, named["x"]).detach(),)

    model = lower(forward, inputs, ["logits"], symbols)
    ranks = {tensor.name: len(tensor.shape) for tensor in tensors}
    add = GraphBuilder()
    masks = {}
    used = {layer for group in compact.dropped.values() for layers in group.live for layer in layers}
    for layer in layout.layers:
        if layer.name in used:
            far = distance(add, layer, layer.weight, layer.threshold, ranks[layer.weight])
            masks[layer.name] = mask(add, far)
    for name, group in compact.dropped.items():
        live = needed(add, group.live, masks)
        staying_rows(add, live, group.width, f"{ACTIVE}{name}", blocks=group.blocks, multiple=MULTIPLE)
    return _with_external_state(model, add, tensors, multiple=bool(compact.dropped))


def masked_graph(
    model: nn.Module, tensors: tuple[StateTensor, ...], shape: tuple[int, ...]
) -> onnx.ModelProto:
    """Returns the whole masked model's graph, inputs, outputs and initialisers as `infer_graph`'s."""
    model = copy.deepcopy(model).eval()
    inputs: dict[str, Tensor] = {"x": torch.zeros(7, *shape)}
    inputs |= {tensor.name: torch.zeros(tensor.shape) for tensor in tensors}

    def forward(x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        named = {tensor.name: value for tensor, value in zip(tensors, state, strict=True)}
        logits: Tensor = torch.func.functional_call(model, named, (x,))
        return (logits.detach(),)

    lowered = lower(forward, inputs, ["logits"], {"x": {0: "batch"}})
    return _with_external_state(lowered, GraphBuilder(), tensors)


def _with_external_state(
    model: onnx.ModelProto, before: GraphBuilder, tensors: tuple[StateTensor, ...], multiple: bool = False
) -> onnx.ModelProto:
    """Returns `model` with the nodes of `before` in front, and its state inputs turned into external initialisers."""
    nodes = [*before.nodes, *model.graph.node]
    used = {name for node in nodes for name in node.input}
    if unread := [tensor.name for tensor in tensors if tensor.name not in used]:
        # a runtime forgets initialisers that no node reads, and then refuses to be given them
        raise LoweringError(f"nothing the model returns depends on {unread[:5]}: take them out of the model")
    kept = [value for value in model.graph.input if not value.name.startswith(ACTIVE)]
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(nodes)
    model.graph.input.extend(kept)
    model.graph.initializer.extend(before.initializers)
    if multiple:
        model.graph.input.append(helper.make_tensor_value_info(MULTIPLE, TensorProto.INT64, (1,)))
    # checked while the state is still an input: the checker looks for the data of external initialisers
    model = tidy(model, {})
    del model.graph.input[1:]
    external = [(tensor.name, TensorProto.FLOAT, tensor.shape, 4) for tensor in tensors]
    external += [(MULTIPLE, TensorProto.INT64, (1,), 8)] if multiple else []
    for name, dtype, sizes, width in external:
        entry = model.graph.initializer.add(
            name=name, data_type=dtype, dims=sizes, data_location=TensorProto.EXTERNAL
        )
        size = width * torch.Size(sizes).numel()
        for key, value in (("location", EXTERNAL), ("offset", "0"), ("length", str(size))):
            entry.external_data.add(key=key, value=value)
    return model
