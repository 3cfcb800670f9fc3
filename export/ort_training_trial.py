"""The proof that artifacts train as PyTorch does: steps of theirs, taken where their runtime is, against eager."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from export.decompositions import LoweringError
from export.host import Arrays
from export.parity import DRAWS, STEP, check_step
from spafl import algorithm
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats, ThresholdLayout
from spafl.manifest import InputSpec, Manifest, StateTensor, TrainStep
from spafl.ort_training import RELEASE
from trainer.local import zero_momenta

DENSITY = 0.5
EXAMPLES = 8
BARE = Hyperparameters(lr=0.01, coeff=0.0, momentum=0.0)
"""Without regulariser, clip and momentum: what is left of a threshold's momentum is the task's gradient."""

Take = Callable[[Path], None]


class TrialHost:
    """A round's state, moved forward by the artifacts in `folder`; `take` has their runtime take a step there."""

    def __init__(self, tensors: tuple[StateTensor, ...], folder: Path, take: Take) -> None:
        self._tensors, self._folder, self._take = tensors, folder, take
        self.state: Arrays = {}
        self.momenta: Arrays = {}
        self.active: Arrays = {}
        self.rows: Arrays = {}

    def synchronise(self, state: Mapping[str, Floats], momenta: Mapping[str, Floats]) -> None:
        """Returns nothing; the next step starts from here."""
        self.state, self.momenta = dict(state), dict(momenta)

    def step(self, x: Floats, y: NDArray[np.int64], h: Hyperparameters) -> tuple[float, int]:
        """Returns mean task loss and right predictions of one step."""
        # in the training model's order: the state, then the momenta
        places = [(self.state, tensor) for tensor in self._tensors]
        places += [(self.momenta, tensor) for tensor in self._tensors if tensor.trained]
        before = np.concatenate([holder[tensor.name].ravel() for holder, tensor in places])
        given: dict[str, Any] = {name: np.array(number, np.float32) for name, number in h.scalars().items()}
        np.savez(self._folder / "before.npz", parameters=before, x=x, y=y, **given)
        self._take(self._folder)
        with np.load(self._folder / "after.npz") as after:
            flat, loss, correct = after["parameters"], float(after["loss"]), int(after["correct"])
        for holder, tensor in places:
            size = holder[tensor.name].size
            holder[tensor.name], flat = flat[:size].reshape(tensor.shape), flat[size:]
        return loss, correct


def check_artifacts(
    model: nn.Module,
    layout: ThresholdLayout,
    tensors: tuple[StateTensor, ...],
    shape: tuple[int, ...],
    folder: Path,
    take: Take,
) -> None:
    """Returns nothing if the artifacts in `folder` make of the sparsified `model` what eager PyTorch does.

    Raises:
        LoweringError: a threshold's gradient, a tensor or a momentum differs after a step; the message names it.
    """
    draw = np.random.default_rng(0)
    host = TrialHost(tensors, folder, take)
    manifest = _manifest(model, layout, tensors, shape)
    eager = copy.deepcopy(model)
    state = {tensor.name: eager.state_dict()[tensor.name].numpy().copy() for tensor in tensors}
    thresholds = algorithm.thresholds_at(layout, state, DENSITY, draw)
    with torch.no_grad():
        for layer in layout.layers:
            eager.state_dict()[layer.threshold].copy_(torch.from_numpy(thresholds[layer.span]))

    def examples() -> tuple[Floats, NDArray[np.int64]]:
        x = draw.normal(0, 1, (EXAMPLES, *shape)).astype(np.float32)
        return x, draw.integers(0, len(manifest.labels), EXAMPLES)

    for h in (BARE, STEP):
        for _ in range(DRAWS):  # a ReLU may sit on its edge for one batch; a mistake sits there for all
            moving = copy.deepcopy(eager)
            momenta = zero_momenta(moving)
            for momentum in momenta.values():
                momentum.add_(torch.from_numpy(draw.normal(0, 0.01, momentum.shape).astype(np.float32)))
            check = check_step(moving, momenta, host, manifest, DENSITY, examples(), h)
            if check.difference <= check.tolerance:
                break
        else:
            raise LoweringError(
                f"ONNX Runtime Training {RELEASE} trains this model wrongly: after a step {check.worst} differs from "
                f"PyTorch by {check.difference:.1e}, allowed {check.tolerance:.1e}. Leave --engine ort_training out; "
                "if the model stops gradients, it must do so with detach()"
            )


def _manifest(
    model: nn.Module, layout: ThresholdLayout, tensors: tuple[StateTensor, ...], shape: tuple[int, ...]
) -> Manifest:
    """Returns as much of a manifest as the checks read: whole tensors, and how many labels there are."""
    with torch.no_grad():
        logits: Tensor = copy.deepcopy(model).eval()(torch.zeros(2, *shape))
    return Manifest(
        name="trial",
        layout=layout,
        state=tuple(replace(tensor, rows=False) for tensor in tensors),
        input=InputSpec(shape=shape, mean=(0.0,) * shape[0], std=(1.0,) * shape[0]),
        labels=tuple(str(label) for label in range(logits.shape[1])),
        train_step=TrainStep(form="dense", reason="ONNX Runtime Training keeps all rows"),
        compaction=(),
        engines={},
        files={},
        producer={},
    )
