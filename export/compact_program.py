"""Physically small XNNPACK programs (.pte): with their weights, or with holes where a device puts its own.

ExecuTorch plans shapes ahead of time, so that a program is made for one mask, on a machine with PyTorch. A program
with its weights takes a device's state; a hollow one takes the mask alone.
"""

import copy
import functools
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from export.build import compaction_of
from export.compact import CompactModel
from export.decompositions import LoweringError
from export.executorch_programs import RELEASE
from export.folding import Folding
from export.lowering import quiet, root_cause
from export.training import state_tensors
from spafl.algorithm import Mask, decided, mask_of
from spafl.bundle import check_state
from spafl.errors import SettingsError
from spafl.layout import Floats
from spafl.manifest import InputSpec, Manifest, TrainStep
from spafl.program import HollowProgram, encode_mask, hollow, mask_digest
from spafl.proof import PROOF, Candidate, Proof, prove
from trainer.sparsify import layout_of

INSTALL = (
    f"pip install --no-deps executorch=={RELEASE} ruamel.yaml flatbuffers tabulate 'torchao>=0.18,<0.19'"
)
"""Without their dependencies: the PyTorch they name is another."""
MAX_BATCH = 64
"""Examples a program takes at once; its memory is planned for as many."""
METHOD = "forward"
CHECK_TOLERANCE = 1e-4
"""Of a program's first run, relative to the largest logit: faults are larger, and the device proves it closer."""
DRAWS = 5
"""Random weights to look for in a program. The four bytes of a single weight may stand in it by chance."""


def require_xnnpack() -> None:
    """Returns nothing if programs can be made here.

    Raises:
        SettingsError: ExecuTorch or what its export needs is missing; the message names the command that helps.
    """
    try:
        found = version("executorch")
        with _quiet():
            import executorch.backends.xnnpack.partition.xnnpack_partitioner
            import executorch.extension.pybindings.portable_lib  # noqa: F401
    except (PackageNotFoundError, ImportError) as error:
        raise SettingsError(f"programs need ExecuTorch and its export tools ({error}): {INSTALL}") from error
    if found.partition("+")[0] != RELEASE:
        raise SettingsError(f"programs need ExecuTorch {RELEASE}, found {found}: {INSTALL}")


def hollow_program(model: nn.Module, manifest: Manifest, mask: Mask, bundle: str) -> HollowProgram:
    """Returns the compact program of `model` (sparsified) for `mask`, run once with weights of nobody's.

    manifest   of the bundle with id `bundle` that the model was exported to
    mask       (out,) bool by masked layer

    The model's own weights do not matter: equal masks give equal programs.

    Raises:
        LoweringError: the model cannot be expressed, or its weights cannot be left out.
    """
    shape = manifest.input.shape
    folding = Folding(model, manifest.state, shape, mask)
    lowered, places = _lowered_with_places(folding, shape)
    sizes = {tensor.name: tensor.shape for tensor in manifest.state}
    fold = _lower(_Fold(folding.fold, places), tuple(torch.zeros(sizes[name]) for name in folding.inputs))
    program = hollow(
        lowered,
        [(place.offset, place.bytes) for place in places],
        fold,
        bundle=bundle,
        layout=manifest.layout.id,
        mask=mask_digest(encode_mask(manifest.layout, mask)),
        executorch=RELEASE,
        inputs=folding.inputs,
    )
    _check(program, model, manifest, mask)
    return program


def whole_program(
    model: nn.Module, manifest: Manifest, state: Mapping[str, Floats], mask: Mask | None = None
) -> bytes:
    """Returns the program of `model` (sparsified) with the weights of `state`, small where `mask` prunes.

    mask   None: the state's own
    """
    mask = mask_of(manifest.layout, state) if mask is None else mask
    folding = Folding(model, manifest.state, manifest.input.shape, mask)
    weights = folding.folded(decided(manifest.layout, state, mask))
    return _lower_model(folding.model(weights), manifest.input.shape)


def write_program(
    model: nn.Module,
    manifest: Manifest,
    state: Mapping[str, Floats],
    out: Path,
    examples: Floats,
    *,
    runs: int = 200,
) -> Proof:
    """Returns the proof for the compact program written to `out`, with the proof beside it as <name>.proof.json.

    Compared with the masked model in eager PyTorch; sizes and times are of the masked model as a program, whole.

    state      of a device, whose mask the program is made for
    examples   (n, *shape) float32, n >= 1: real inputs

    Raises:
        BundleError: the state is not one of this model.
        LoweringError: the model cannot be expressed, or the program differs from it; nothing is written then.
    """
    check_state(manifest, state)
    mask = mask_of(manifest.layout, state)
    small = whole_program(model, manifest, state, mask)
    # a model whose filters are all active has the masked one's shapes: only the weights are another's
    every = {name: np.ones_like(rows) for name, rows in mask.items()}
    large = whole_program(model, manifest, state, every)
    run_small, run_large = _Runtime(small), _Runtime(large)
    proof = prove(
        manifest,
        mask,
        examples,
        masked=Candidate(_eager(model, decided(manifest.layout, state, mask)), run_large, len(large)),
        compact=Candidate(run_small.logits, run_small, len(small)),
        runtime=f"executorch {RELEASE}",
        runs=runs,
    )
    if not proof.equal:
        raise LoweringError(proof.refusal())
    out.parent.mkdir(parents=True, exist_ok=True)
    proof_part, part = (out.with_name(f"{out.name}{ending}.part") for ending in (f".{PROOF}", ""))
    try:
        proof_part.write_text(proof.to_text(indent=2) + "\n")
        part.write_bytes(small)
        proof_part.replace(proof_path(out))
        part.replace(out)
    finally:
        for left in (proof_part, part):
            left.unlink(missing_ok=True)
    return proof


def source_manifest(model: nn.Module, spec: InputSpec, labels: tuple[str, ...]) -> Manifest:
    """Returns the manifest of `model` (sparsified) without a bundle: what its states and masks look like.

    Raises:
        LoweringError: it holds something that devices cannot keep.
    """
    whole = CompactModel(model, spec.shape, dropped=lambda group: False)
    return Manifest(
        name="source",
        layout=layout_of(model),
        state=state_tensors(model, whole),
        input=spec,
        labels=labels,
        train_step=TrainStep(form="dense", reason="not exported"),
        compaction=compaction_of(whole),
        engines={},
        files={},
        producer={},
    )


def proof_path(program: Path) -> Path:
    """Returns where the proof of a program at that path stands."""
    return program.with_name(f"{program.stem}.{PROOF}")


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in a program's file a weight is: the fold's output of that number, its axes in that order."""

    offset: int
    bytes: int
    number: int
    axes: tuple[int, ...]


class _Fold(nn.Module):
    """The fold with its weights as the model's file holds them: in the order of their places, flat."""

    def __init__(self, fold: nn.Module, places: Sequence[_Place]) -> None:
        super().__init__()
        self.fold, self.places = fold, places

    def forward(self, *state: Tensor) -> tuple[Tensor, ...]:
        """Returns flat weights."""
        weights = self.fold(*state)
        # a clone: a tensor that goes through unchanged would come out as the input's own memory
        return tuple(weights[place.number].permute(place.axes).reshape(-1).clone() for place in self.places)


def _lowered_with_places(folding: Folding, shape: tuple[int, ...]) -> tuple[bytes, list[_Place]]:
    """Returns the model's half as a program with random weights, and where they are in it, by offset."""
    for seed in range(DRAWS):
        draw = np.random.default_rng(seed)
        weights = [_random(draw, size) for size in folding.shapes]
        lowered = _lower_model(folding.model([torch.from_numpy(weight) for weight in weights]), shape)
        places = [_place(lowered, number, weight) for number, weight in enumerate(weights)]
        found = sorted((place for place in places if place), key=lambda place: place.offset)
        if len(found) == len(places):
            return lowered, found
    raise LoweringError(f"a weight of the compact model stands in its program more than once, {DRAWS} times")


def _place(program: bytes, number: int, weight: Floats) -> _Place | None:
    """Returns where `weight` is in `program`, its axes in any order; None if it is in several places.

    Raises:
        LoweringError: it is nowhere: the compiler made something else of it, which only it can.
    """
    # first as they are, then channels last, as XNNPACK has them
    orders = [tuple(range(weight.ndim)), (0, *range(2, weight.ndim), 1)] if weight.ndim > 2 else []
    for axes in [*orders, *itertools.permutations(range(weight.ndim))]:
        data = np.ascontiguousarray(weight.transpose(axes)).tobytes()
        offset = program.find(data)
        if offset >= 0:
            again = program.find(data, offset + 1)
            return _Place(offset, len(data), number, axes) if again < 0 else None
    raise LoweringError(
        f"the compiler changed a weight of shape {weight.shape}, so that no device can put its own there"
    )


def _random(draw: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Returns normal numbers of such a size that sums over the weights of a filter stay near 1."""
    inputs = max(1, int(np.prod(shape[1:])))
    return np.asarray(draw.normal(0.0, inputs**-0.5, shape), np.float32)


def _check(program: HollowProgram, model: nn.Module, manifest: Manifest, mask: Mask) -> None:
    """Returns nothing if a device with random weights would get what PyTorch computes.

    Raises:
        LoweringError: it would not; ExecuTorch has faults that nothing else tells.
    """
    draw = np.random.default_rng(DRAWS)
    state = {
        # variances are positive
        tensor.name: abs(values) + 0.5 if tensor.role == "statistic" else values
        for tensor in manifest.state
        for values in [_random(draw, tensor.shape)]
    }
    state = decided(manifest.layout, state, mask)
    x = draw.normal(size=(MAX_BATCH, *manifest.input.shape)).astype(np.float32)
    fold = _Runtime(program.fold)
    run = _Runtime(program.filled(fold(*(state[name] for name in program.header.inputs))))
    expected = _eager(model, state)(x)
    for count in (MAX_BATCH, 1):
        (got,) = run(x[:count])
        difference = float(np.abs(got - expected[:count]).max() / max(np.abs(expected).max(), 1e-30))
        if not difference <= CHECK_TOLERANCE:
            raise LoweringError(
                f"the compact program differs from PyTorch by {difference:.1e} of the largest logit, allowed "
                f"{CHECK_TOLERANCE:.0e}: please report the model"
            )


def _eager(model: nn.Module, state: Mapping[str, Floats]) -> Callable[[Floats], Floats]:
    """Returns the masked model in PyTorch, with the weights of `state`."""
    masked = copy.deepcopy(model).eval()
    masked.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=False)

    def logits(x: Floats) -> Floats:
        with torch.no_grad():
            return np.asarray(masked(torch.tensor(x)).numpy())

    return logits


class _Runtime:
    """A program run by ExecuTorch's Python runtime on one thread: float32 arrays in and out."""

    def __init__(self, program: bytes) -> None:
        with _quiet():
            from executorch.extension.pybindings import portable_lib

            _use_one_thread()
            try:
                self._module = portable_lib._load_for_executorch_from_buffer(program)
            except RuntimeError as error:
                raise LoweringError(f"ExecuTorch cannot load what it made: {root_cause(error)}") from error
        self._program = program  # held: the runtime reads it and keeps no reference

    def __call__(self, *arrays: Floats) -> list[Floats]:
        """Returns the program's outputs."""
        try:
            outputs = self._module.run_method(METHOD, tuple(torch.tensor(array) for array in arrays))
        except RuntimeError as error:
            raise LoweringError(f"ExecuTorch cannot run what it made: {root_cause(error)}") from error
        return [output.numpy().copy() for output in outputs]

    def logits(self, x: Floats) -> Floats:
        """Returns the logits of any number of examples."""
        return np.concatenate([self(x[at : at + MAX_BATCH])[0] for at in range(0, len(x), MAX_BATCH)])


@functools.cache
def _use_one_thread() -> None:
    """Returns nothing; ExecuTorch's operators use one thread from now on, and do not tell of looking for processors."""
    from executorch.extension.pybindings import portable_lib

    sys.stderr.flush()
    stderr = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            portable_lib._unsafe_reset_threadpool(1)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


def _lower_model(module: nn.Module, shape: tuple[int, ...]) -> bytes:
    """Returns the model's half as a program for XNNPACK, for batches up to MAX_BATCH."""
    # the largest batch as the example: XNNPACK plans for fewer than asked where it was a small one
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    return _lower(module, (torch.zeros(MAX_BATCH, *shape),), ({0: batch},))


def _lower(module: nn.Module, inputs: tuple[Tensor, ...], dynamic: Any = None) -> bytes:
    """Returns the .pte program of `module`: by XNNPACK where its batch is `dynamic`, by portable kernels else."""
    require_xnnpack()
    with _quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge, to_edge_transform_and_lower

        try:
            program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
            if dynamic:
                edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
            else:
                edge = to_edge(program)
            return bytes(edge.to_executorch().buffer)
        except Exception as error:  # its passes raise what they happen to raise
            raise LoweringError(f"ExecuTorch cannot compile the model: {root_cause(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what PyTorch and ExecuTorch say of their own insides, and leaves logging as it was."""
    root = logging.getLogger()
    handlers = root.handlers[:]
    try:
        with quiet("torch", "torchao", "executorch", "root"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.handlers[:] = handlers  # importing the partitioner sets up logging for everybody
