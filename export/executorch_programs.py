"""`train_step.pte` and `evaluate.pte`: the training step and the masked model as ExecuTorch programs.

Both take the state as inputs and hold no weights. They are planned for MAX_BATCH examples and run any number from 1
to that; a runtime that gives them memory which is not touched yet pays for the examples it has.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, fx, nn

from export.compact import CompactModel
from export.decompositions import LoweringError
from export.lowering import FlatModule, quiet, root_cause, trace
from export.portable import portable_decompositions
from export.portable_graph import tidy_up
from export.training import flat_step
from spafl.errors import SettingsError
from spafl.layout import ThresholdLayout
from spafl.manifest import EngineFiles, StateTensor
from spafl.step import NEXT

aten = torch.ops.aten

RELEASE = "1.5.1"
"""Of ExecuTorch: the only one whose runtime the engine uses."""
MAX_BATCH = 64
"""Examples at a time that memory is planned for: the default batch size. Planned for 256, smaller batches would write
to twice as many pages, because what shares memory in turns is then laid out for the largest batch."""


def executorch_programs(
    model: nn.Module, layout: ThresholdLayout, tensors: tuple[StateTensor, ...], shape: tuple[int, ...]
) -> tuple[dict[str, bytes], EngineFiles]:
    """Returns the programs of a sparsified `model` by file name, and the engine's entry in the manifest.

    Raises:
        LoweringError: an operation that ExecuTorch has no form for.
        SettingsError: ExecuTorch is not installed, or of another release.
    """
    require_executorch()
    programs = {
        "train_step": train_step_program(model, tensors, shape),
        "evaluate": evaluate_program(model, tensors, shape),
    }
    names = {role: f"{role}.pte" for role in programs}
    entry = EngineFiles(
        files=names,
        requires={"executorch": RELEASE},
        operators={role: dict(sorted(operators.items())) for role, (_, operators) in programs.items()},
    )
    return {names[role]: program for role, (program, _) in programs.items()}, entry


def require_executorch() -> None:
    """Returns nothing if programs can be made here.

    Raises:
        SettingsError: ExecuTorch is not installed, or of another release; the message names the command that helps.
    """
    try:
        found = version("executorch").partition("+")[0]
    except PackageNotFoundError:
        found = "none"
    if found != RELEASE:
        raise SettingsError(
            f"--engine executorch needs ExecuTorch {RELEASE}, found {found}: pip install --no-deps "
            f"executorch=={RELEASE} ruamel.yaml flatbuffers tabulate 'torchao>=0.18,<0.19'"
        )


def train_step_program(
    model: nn.Module, tensors: tuple[StateTensor, ...], shape: tuple[int, ...]
) -> tuple[bytes, Counter[str]]:
    """Returns the training step of whole tensors as a program, and its operators with their counts.

    Inputs    x (n, *shape), y (n,) int64, the scalars of `spafl.step.SCALARS`, each state tensor, momentum.<tensor> of
              each trained one
    Outputs   loss (), correct () int64, the next state tensors and momenta; each may be written over its input
    """
    whole = [replace(tensor, rows=False) for tensor in tensors]
    step = flat_step(
        CompactModel(model, shape, dropped=lambda group: False, training=True), tuple(whole), shape
    )
    names = list(step.inputs)
    in_place = [
        (names.index(name.removeprefix(NEXT)), at) for at, name in enumerate(step.outputs) if NEXT in name
    ]
    return program(step.function, step.inputs, ("x", "y"), in_place)


def evaluate_program(
    model: nn.Module, tensors: tuple[StateTensor, ...], shape: tuple[int, ...]
) -> tuple[bytes, Counter[str]]:
    """Returns the masked model as a program, and its operators with their counts.

    Inputs    x (n, *shape), each state tensor
    Outputs   logits (n, labels)
    """
    masked = copy.deepcopy(model).eval()

    def forward(x: Tensor, *state: Tensor) -> tuple[Tensor]:
        named = {tensor.name: value for tensor, value in zip(tensors, state, strict=True)}
        logits: Tensor = torch.func.functional_call(masked, named, (x,))
        return (logits.detach(),)

    inputs = {"x": torch.zeros(1, *shape)} | {tensor.name: torch.zeros(tensor.shape) for tensor in tensors}
    return program(forward, inputs, ("x",))


def program(
    function: Callable[..., tuple[Tensor, ...]],
    inputs: Mapping[str, Tensor],
    batched: Sequence[str],
    in_place: Sequence[tuple[int, int]] = (),
) -> tuple[bytes, Counter[str]]:
    """Returns `function(*inputs.values())` as a program, and its operators with their counts.

    batched    the inputs whose first axis is the batch, of any size from 1 to MAX_BATCH
    in_place   (input, output) numbers that may share their memory

    Raises:
        LoweringError: an operation that ExecuTorch has no form for; the message names it.
    """
    size = _distinct_size(value.shape for name, value in inputs.items() if name not in batched)
    examples = [
        value.new_zeros(size, *value.shape[1:]) if name in batched else value
        for name, value in inputs.items()
    ]
    dynamic = [name in batched for name in inputs]
    try:
        with warnings.catch_warnings(), quiet("torch", "torch.__trace", "executorch", "root"):
            warnings.simplefilter("ignore")  # the exporters warn of their own internals
            symbolic = [(0,) if each else () for each in dynamic]
            traced = trace(function, examples, symbolic, portable_decompositions())
            tidy_up(traced, in_place)
            return _lower(traced, examples, dynamic)
    except LoweringError:
        raise
    except Exception as error:  # torch's and ExecuTorch's own share no base class
        raise LoweringError(f"the model has no ExecuTorch program: {root_cause(error)}") from error


def _lower(
    traced: fx.GraphModule, examples: Sequence[Tensor], dynamic: Sequence[bool]
) -> tuple[bytes, Counter[str]]:
    # imported here: a bundle for other engines needs no ExecuTorch
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge
    from executorch.exir.passes import MemoryPlanningPass

    batch = torch.export.Dim(
        "batch", min=2, max=MAX_BATCH
    )  # it runs one, too; tracing takes a 1 for a constant
    shapes = tuple({0: batch} if each else None for each in dynamic)
    exported = torch.export.export(
        FlatModule(traced), tuple(examples), dynamic_shapes={"values": shapes}, strict=False
    )
    # `linear` would be taken apart into a transposition and a product, which is what it is there to avoid
    edge = to_edge(
        exported,
        compile_config=EdgeCompileConfig(preserve_ops=[aten.linear.default], _check_ir_validity=False),
    )
    # inputs and outputs stay the caller's memory: nothing is copied, and the state can be written over itself
    planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
    lowered = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning))
    return bytes(lowered.buffer), _operators(lowered.executorch_program)


def _operators(program: Any) -> Counter[str]:
    """Returns the operators of a program's only method with their counts."""
    (plan,) = program.execution_plan
    names = [
        f"{operator.name}.{operator.overload}" if operator.overload else operator.name
        for operator in plan.operators
    ]
    return Counter(
        names[instruction.instr_args.op_index]
        for chain in plan.chains
        for instruction in chain.instructions
        if hasattr(instruction.instr_args, "op_index")
    )


def _distinct_size(shapes: Iterable[Sequence[int]]) -> int:
    """Returns the largest prime up to MAX_BATCH that is no fixed size: tracing takes equal sizes for the same axis."""
    fixed = {size for shape in shapes for size in shape}
    primes = (n for n in range(MAX_BATCH, 1, -1) if all(n % d for d in range(2, int(n**0.5) + 1)))
    return next(prime for prime in primes if prime not in fixed)
