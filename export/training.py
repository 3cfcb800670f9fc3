"""`train_step.onnx`: the whole training step of a sparsified model as one ONNX graph."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import onnx
import torch
from torch import Tensor, nn

from export.compact import CompactModel
from export.lowering import lower
from export.step import StepTensors, training_step
from export.strangers import refuse_strangers
from spafl.manifest import Role, StateTensor, TrainStep
from spafl.step import ACTIVE, MOMENTUM, NEXT, ROWS, SCALARS
from trainer.sparsify import masked_layers


def state_tensors(model: nn.Module, compact: CompactModel) -> tuple[StateTensor, ...]:
    """Returns what a device keeps of `model`, in state_dict order; `rows` where the step takes active rows.

    Raises:
        LoweringError: the model holds something that the step has no place for; the message names it.
    """
    refuse_strangers(model)
    masked = masked_layers(model)
    rows = {tensor: layer for layer, names in compact.rows.items() for tensor in names}
    parameters = dict(model.named_parameters())
    tensors = []
    for name, value in model.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "num_batches_tracked":
            continue  # only a norm without momentum reads it, and sparsify refuses those
        role: Role
        if name not in parameters:
            role = "statistic"
        elif layer in masked and leaf in ("weight", "threshold"):
            role = "weight" if leaf == "weight" else "threshold"
        else:
            role = "parameter"
        owner = rows.get(name) or (layer if layer in masked else None)
        tensors.append(
            StateTensor(name=name, shape=tuple(value.shape), role=role, layer=owner, rows=name in rows)
        )
    return tuple(tensors)


def form(compact: CompactModel) -> TrainStep:
    """Returns the form of the train step of `compact`, and why it is exact or which layers it keeps whole."""
    whole = {
        name: "not asked for" if group.exact else group.refusal or "; ".join(group.audible)
        for name, group in compact.flows.by_layer.items()
        if group.name not in compact.dropped
    }
    kept = "; ".join(f"{name} keeps all rows: {reason}" for name, reason in whole.items())
    if not compact.dropped:
        return TrainStep(form="dense", reason=kept)
    rows = [layer for group in compact.dropped.values() for layer in group.layers]
    exact = f"{', '.join(rows)}: a pruned channel is exactly 0 and gets exactly no task gradient"
    return TrainStep(form="rows", reason=f"{exact}; {kept}" if kept else exact)


def train_step_graph(
    compact: CompactModel, tensors: tuple[StateTensor, ...], shape: tuple[int, ...]
) -> onnx.ModelProto:
    """Returns the graph of `flat_step`, its inputs and outputs under those names.

    Raises:
        LoweringError: an operation that cannot be expressed.
    """
    step = flat_step(compact, tensors, shape)
    return lower(step.function, step.inputs, step.outputs, step.symbols)


@dataclass(frozen=True)
class FlatStep:
    """A step as a function of arrays in a fixed order, for tracing.

    inputs     an example of each by name, in order
    outputs    names, in order
    symbols    by input, the names of its symbolic axes
    """

    function: Callable[..., tuple[Tensor, ...]]
    inputs: dict[str, Tensor]
    outputs: list[str]
    symbols: dict[str, dict[int, str]]


def flat_step(compact: CompactModel, tensors: tuple[StateTensor, ...], shape: tuple[int, ...]) -> FlatStep:
    """Returns the step of a model rewired for training.

    Inputs    x (batch, *shape), y (batch,) int64, the scalars of `spafl.step.SCALARS`, active.<layer> (rows,) int64,
              each state tensor, and momentum.<tensor> of each trained one; where the manifest says rows, both hold
              active rows only and the state tensor is called rows.<tensor>
    Outputs   loss (), correct () int64, next.<input> of every state tensor and momentum
    """
    values = model_values(compact)
    sizes = distinct_sizes(values.values(), shape)
    batch = next(sizes)
    # equally many in each block: a multiple
    counts = {name: next(sizes) * group.blocks for name, group in compact.dropped.items()}
    inputs: dict[str, Tensor] = {"x": torch.zeros(batch, *shape), "y": torch.zeros(batch, dtype=torch.int64)}
    inputs |= {name: torch.tensor(0.1) for name in SCALARS}
    inputs |= {f"{ACTIVE}{layer}": torch.arange(count) for layer, count in counts.items()}
    symbols: dict[str, dict[int, str]] = {"x": {0: "batch"}, "y": {0: "batch"}}
    symbols |= {f"{ACTIVE}{layer}": {0: f"{ROWS}{layer}"} for layer in counts}

    def example(tensor: StateTensor) -> Tensor:
        return torch.zeros(counts[str(tensor.layer)] if tensor.rows else tensor.shape[0], *tensor.shape[1:])

    def add(name: str, tensor: StateTensor) -> None:
        inputs[name] = example(tensor) if tensor.shape else torch.zeros(())
        if tensor.rows:
            symbols[name] = {0: f"{ROWS}{tensor.layer}"}

    for tensor in tensors:
        add(tensor.step_name, tensor)
    for tensor in tensors:
        if tensor.trained:
            add(f"{MOMENTUM}{tensor.name}", tensor)
    step = training_step(compact, tensors)
    trained = [tensor.name for tensor in tensors if tensor.trained]

    def flat(*arguments: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(inputs, arguments, strict=True))
        result = step(
            named["x"],
            named["y"],
            {name: named[name] for name in SCALARS},
            StepTensors(
                active={layer: named[f"{ACTIVE}{layer}"] for layer in counts},
                state={tensor.name: named[tensor.step_name] for tensor in tensors},
                momenta={name: named[f"{MOMENTUM}{name}"] for name in trained},
            ),
        )
        state = [result.state[tensor.name].detach() for tensor in tensors]
        return (result.loss, result.correct, *state, *(result.momenta[name].detach() for name in trained))

    outputs = ["loss", "correct"]
    outputs += [f"{NEXT}{tensor.step_name}" for tensor in tensors]
    outputs += [f"{NEXT}{MOMENTUM}{name}" for name in trained]
    return FlatStep(flat, inputs, outputs, symbols)


def model_values(compact: CompactModel) -> dict[str, Tensor]:
    """Returns the model's state tensors by name, detached."""
    return {name: value.detach() for name, value in compact.model.state_dict().items()}


def distinct_sizes(values: Iterable[Tensor], shape: tuple[int, ...]) -> Iterator[int]:
    """Returns an endless run of primes that divide no fixed size: tracing takes equal sizes for the same axis."""
    fixed = {size for value in values for size in value.shape} | set(shape)
    primes = (n for n in itertools.count(11, 2) if all(n % d for d in range(3, int(n**0.5) + 1, 2)))
    return (prime for prime in primes if not any(size % prime == 0 for size in fixed))
