"""A compact model in two halves: what happens to weights alone, and what happens to examples.

Inference forwards of a `CompactModel` select, mask and fold weights before they meet an example. Traced once for one
mask, everything that depends on weights and not on an example is the first half, the fold: state in, small weights
out. The rest, the model, takes these weights as parameters: a runtime can compile it for a phone without knowing them.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, fx, nn

from export.build import compaction_of
from export.compact import CompactModel
from export.decompositions import LoweringError
from export.lowering import root_cause
from export.training import distinct_sizes, model_values
from spafl.algorithm import Mask
from spafl.layout import Floats
from spafl.manifest import StateTensor
from spafl.rows import kept_rows
from trainer.masked import Masked
from trainer.sparsify import masked_layers

aten = torch.ops.aten

LEAST_BATCH = 32
"""Of the example a batch is traced with; XNNPACK plans for less than asked where it was smaller."""
_FLATTENS = (aten.flatten.using_ints, aten.view.default, aten.reshape.default)


class Folding:
    """The halves of `model` (sparsified) for one mask.

    inputs    names of the state tensors the fold reads, in its order
    fold      a module: those tensors -> the weights of the model's half, in the order they are met
    shapes    of these weights
    """

    def __init__(
        self, model: nn.Module, tensors: Sequence[StateTensor], shape: tuple[int, ...], mask: Mask
    ) -> None:
        names = [tensor.name for tensor in tensors]
        program = _traced(model, names, shape, mask)
        graph = program.graph_module.graph
        specs = program.graph_signature.input_specs
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        values = {
            node: _constant(program, spec.target)
            for node, spec in zip(placeholders, specs, strict=True)
            if spec.target is not None
        }
        x, *state = (node for node in placeholders if node not in values)
        (result,) = next(node for node in graph.nodes if node.op == "output").args[0]
        late, early = _downstream(graph, [x]), _downstream(graph, state)
        needed = _upstream([result])
        _evaluate([node for node in graph.nodes if node in needed - late - early], values)
        weights = [
            node
            for node in graph.nodes
            if node in early - late and any(user in late & needed for user in node.users)
        ]
        for node in weights:
            if node.meta["val"].dtype != torch.float32:
                raise LoweringError(
                    f"{node.name} is of dtype {node.meta['val'].dtype}, expected float32 weights"
                )
        read = _upstream(weights)
        self.inputs = tuple(name for name, node in zip(names, state, strict=True) if node in read)
        self.fold = _part(values, [node for node in state if node in read], weights)
        self.shapes = tuple(tuple(node.meta["val"].shape) for node in weights)
        self._values, self._x, self._result, self._weights = values, x, result, weights

    def folded(self, state: Mapping[str, Floats]) -> list[Tensor]:
        """Returns the weights of the model's half, by PyTorch."""
        with torch.no_grad():
            weights = self.fold(
                *(torch.from_numpy(np.ascontiguousarray(state[name])) for name in self.inputs)
            )
        return [weight.contiguous() for weight in weights]

    def model(self, weights: Sequence[Tensor]) -> nn.Module:
        """Returns the model's half as a module: x (batch, *shape) -> logits (batch, labels)."""
        fixed = dict(zip(self._weights, weights, strict=True))
        module = _part({**self._values, **fixed}, [self._x], self._result)
        for node in module.graph.nodes:
            _free_batch(node)
        module.recompile()
        return module


def _traced(
    model: nn.Module, names: Sequence[str], shape: tuple[int, ...], mask: Mask
) -> torch.export.ExportedProgram:
    """Returns the whole inference of `model`, (x, *state tensors) -> logits, its selections fixed by `mask`."""
    compact = CompactModel(model, shape, dropped=lambda group: group.drops)
    values = model_values(compact)
    batch = next(size for size in distinct_sizes(values.values(), shape) if size >= LEAST_BATCH)
    dynamic = {0: torch.export.Dim("batch", min=1)}
    try:
        return torch.export.export(
            _Inference(compact, names, mask).eval(),
            (torch.zeros(batch, *shape), tuple(values[name] for name in names)),
            dynamic_shapes={"x": dynamic, "state": tuple(None for _ in names)},
            strict=False,
        )
    except (torch._dynamo.exc.UserError, NotImplementedError, RuntimeError) as error:
        raise LoweringError(f"the model cannot be traced: {root_cause(error)}") from error


class _Inference(nn.Module):
    """The compact model's inference as a module whose masks and selections are constants."""

    def __init__(self, compact: CompactModel, names: Sequence[str], mask: Mask) -> None:
        super().__init__()
        self._compact, self._names = compact, names
        self._masked = masked_layers(compact.model)
        kept = kept_rows(compaction_of(compact), mask)
        for number, layer in enumerate(self._masked):
            whole = torch.from_numpy(np.where(mask[layer], 1, -1).astype(np.float32))
            self.register_buffer(f"whole{number}", whole)
            self.register_buffer(f"rows{number}", whole[kept[layer]] if layer in kept else whole)
        for number, group in enumerate(compact.dropped):
            self.register_buffer(f"active{number}", torch.from_numpy(kept[group]))

    def forward(self, x: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        """Returns logits (batch, labels)."""
        for number, module in enumerate(self._masked.values()):
            # not from scores and thresholds: a filter on the edge would be active here and pruned there
            module.distance = partial(self._distance, number, module)  # type: ignore[method-assign]
        self._compact.active = {
            group: getattr(self, f"active{number}") for number, group in enumerate(self._compact.dropped)
        }
        return self._compact.run(dict(zip(self._names, state, strict=True)), x)

    def _distance(self, number: int, module: Masked) -> Tensor:
        # where constants of what is left out are looked for, the layer is whole
        whole: Tensor = getattr(self, f"whole{number}")
        rows: Tensor = getattr(self, f"rows{number}")
        return whole if len(module.weight) == len(whole) else rows


def _evaluate(nodes: Sequence[fx.Node], values: dict[fx.Node, Tensor]) -> None:
    """Returns nothing; `values` gains those of the `nodes` that depend on nothing else."""
    for node in nodes:
        if node.op == "call_function" and all(source in values for source in node.all_input_nodes):
            arguments = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            value = node.target(*arguments[0], **arguments[1])  # type: ignore[operator]
            if isinstance(value, Tensor):
                values[node] = value


def _constant(program: torch.export.ExportedProgram, name: str) -> Tensor:
    value = program.state_dict[name] if name in program.state_dict else program.constants[name]
    if not isinstance(value, Tensor):
        raise LoweringError(f"{name} is {type(value).__name__}, expected a tensor")
    return value


def _downstream(graph: fx.Graph, start: Sequence[fx.Node]) -> set[fx.Node]:
    """Returns the nodes that depend on `start`, these among them."""
    found = set(start)
    for node in graph.nodes:  # in order: whatever a node reads was asked before
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _upstream(ends: Sequence[fx.Node], cut: Collection[fx.Node] = ()) -> set[fx.Node]:
    """Returns the nodes that `ends` depend on, these among them, without what lies behind `cut`."""
    found, waiting = set[fx.Node](), list(ends)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(() if node in cut else node.all_input_nodes)
    return found


def _part(
    values: Mapping[fx.Node, Tensor], inputs: Sequence[fx.Node], outputs: fx.Node | list[fx.Node]
) -> fx.GraphModule:
    """Returns the part of a graph from `inputs` to `outputs` as a module; it holds the `values` met on the way."""
    ends = outputs if isinstance(outputs, list) else [outputs]
    needed = _upstream(ends, {*values, *inputs})
    graph, root, copies = fx.Graph(), nn.Module(), dict[fx.Node, fx.Node]()
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
    for node in ends[0].graph.nodes:
        if node not in needed or node in copies:
            continue
        if node in values:
            root.register_parameter(node.name, nn.Parameter(values[node], requires_grad=False))
            copies[node] = graph.get_attr(node.name)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[node] for node in ends) if isinstance(outputs, list) else copies[outputs])
    return fx.GraphModule(root, graph)


def _free_batch(node: fx.Node) -> None:
    """Lets a reshape that keeps the batch say so by -1: with a size computed at run time, XNNPACK leaves it alone.

    It would then compute in two pieces with a copy between them: a third of LeNet-5's time.
    """
    if node.op != "call_function" or node.target not in _FLATTENS:
        return
    source = node.args[0]
    before, after = source.meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
    if before[0] == after[0] and all(isinstance(size, int) for size in after[1:]):
        node.target = aten.reshape.default
        node.args, node.kwargs = (source, [-1, *after[1:]]), {}
