"""`infer.onnx` and `masked.onnx`: one forward pass whose weights the device supplies.

Both hold their weights as external initialisers without data. `infer.onnx` selects the active channels in the graph;
a runtime that folds constants does so once, when it loads the model, and what it saves is physically small.
`masked.onnx` is the model as PyTorch has it, whole and masked: what the small one is proven against.
"""

import copy

import onnx
import torch
from onnx import TensorProto
from torch import Tensor, nn

from export.compact import CompactModel
from export.decompositions import LoweringError
from export.lowering import lower, tidy
from export.round import GraphBuilder, active_rows, distance, mask
from export.training import distinct_sizes, model_values
from spafl.layout import ThresholdLayout
from spafl.manifest import StateTensor
from spafl.step import ACTIVE, ROWS

EXTERNAL = "state"
"""Where the initialisers claim their data is; no such file exists, so a runtime that is given none must fail."""


def infer_graph(
    compact: CompactModel, layout: ThresholdLayout, tensors: tuple[StateTensor, ...], shape: tuple[int, ...]
) -> onnx.ModelProto:
    """Returns the self-compacting graph for a model made ready by `for_inference`.

    Inputs    x (batch, *shape) float32
    Outputs   logits (batch, labels)
    External initialisers: the state tensors under their own names.
    """
    sizes = distinct_sizes(model_values(compact).values(), shape)
    batch = next(sizes)
    inputs: dict[str, Tensor] = {"x": torch.zeros(batch, *shape)}
    symbols = {"x": {0: "batch"}}
    for name in compact.dropped:
        inputs[f"{ACTIVE}{name}"] = torch.arange(next(sizes))
        symbols[f"{ACTIVE}{name}"] = {0: f"{ROWS}{name}"}
    inputs |= {tensor.name: torch.zeros(tensor.shape) for tensor in tensors}

    def forward(*arguments: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(inputs, arguments, strict=True))
        compact.active = {layer: named[f"{ACTIVE}{layer}"] for layer in compact.dropped}
        return (compact.run({tensor.name: named[tensor.name] for tensor in tensors}, named["x"]).detach(),)

    model = lower(forward, inputs, ["logits"], symbols)
    ranks = {tensor.name: len(tensor.shape) for tensor in tensors}
    add = GraphBuilder()
    for layer in layout.layers:
        if layer.name in compact.dropped:
            far = distance(add, layer, layer.weight, layer.threshold, ranks[layer.weight])
            active_rows(add, mask(add, far), f"{ACTIVE}{layer.name}")
    return _with_external_state(model, add, tensors)


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
    model: onnx.ModelProto, before: GraphBuilder, tensors: tuple[StateTensor, ...]
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
    # checked while the state is still an input: the checker looks for the data of external initialisers
    model = tidy(model, {})
    del model.graph.input[1:]
    for tensor in tensors:
        entry = model.graph.initializer.add(
            name=tensor.name,
            data_type=TensorProto.FLOAT,
            dims=tensor.shape,
            data_location=TensorProto.EXTERNAL,
        )
        size = 4 * torch.Size(tensor.shape).numel()
        for key, value in (("location", EXTERNAL), ("offset", "0"), ("length", str(size))):
            entry.external_data.add(key=key, value=value)
    return model
