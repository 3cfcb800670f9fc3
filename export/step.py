"""One step of local training as a function of its state: forward, backward, regulariser, clip, momentum SGD."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from export.compact import CompactModel
from spafl.manifest import StateTensor


@dataclass(frozen=True)
class StepTensors:
    """What the step reads and writes besides the batch, by name; weights hold only active rows where dropped.

    active      (k,) int64 by layer in rows form
    state       trained tensors and statistics; thresholds are always whole, (out,)
    momenta     of the trained tensors, same names and shapes
    """

    active: dict[str, Tensor]
    state: dict[str, Tensor]
    momenta: dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """loss: mean task loss (), correct: right predictions () int64, and the next state and momenta."""

    loss: Tensor
    correct: Tensor
    state: dict[str, Tensor]
    momenta: dict[str, Tensor]


def training_step(
    model: CompactModel, tensors: tuple[StateTensor, ...]
) -> Callable[[Tensor, Tensor, dict[str, Tensor], StepTensors], StepResult]:
    """Returns step(x, y, scalars, tensors) -> StepResult for a model rewired for training.

    x (N, *shape) float32, y (N,) int64, scalars as in `spafl.step.SCALARS`.

    Thresholds travel whole, so those of filters left out of the rows advance under the regulariser here, step by
    step, and share the clip factor: they need no treatment of their own afterwards.
    """
    trained = [tensor.name for tensor in tensors if tensor.trained]
    statistics = [tensor.name for tensor in tensors if not tensor.trained]
    thresholds = [tensor.name for tensor in tensors if tensor.role == "threshold"]

    def step(x: Tensor, y: Tensor, scalars: dict[str, Tensor], tensors: StepTensors) -> StepResult:
        model.active = tensors.active
        fixed = {name: tensors.state[name] for name in statistics}

        def objective(weights: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor, dict[str, Tensor]]]:
            rows = dict(weights)
            for group in model.dropped.values():
                for layer in group.layers:
                    name = f"{layer}.threshold"
                    rows[name] = weights[name].index_select(0, tensors.active[group.name])
            logits = model.run_rows({**fixed, **rows}, x)  # (N, labels)
            task = _cross_entropy(logits, y)
            # loss = task + coeff * sum_l sum_i exp(-tau_i)   (paper, section 3)
            regulariser = sum(torch.exp(-weights[name]).sum() for name in thresholds)
            return task + scalars["coeff"] * regulariser, (task, logits, model.statistics)

        weights = {name: tensors.state[name] for name in trained}
        gradients, (_, (task, logits, new)) = torch.func.grad_and_value(objective, has_aux=True)(weights)
        norms = [torch.linalg.vector_norm(gradient) for gradient in gradients.values()]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        factor = torch.clamp(scalars["clip"] / (norm + 1e-6), max=1.0)
        momenta = {
            name: scalars["momentum"] * tensors.momenta[name] + factor * gradients[name] for name in trained
        }
        state = {
            name: weights[name] - scalars["threshold_lr" if name in thresholds else "lr"] * momenta[name]
            for name in trained
        }
        correct = (logits.argmax(1) == y).sum()
        return StepResult(task.detach(), correct, {**state, **new}, momenta)

    return step


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Returns the mean cross entropy () of logits (N, labels) and y (N,), in 20 operators less than torch's.

    Torch's looks for labels to ignore, and scatters its gradient. Devices check labels when they read them.
    """
    labels = torch.arange(logits.shape[1])
    chosen = (y[:, None] == labels).to(logits.dtype)
    return -(chosen * F.log_softmax(logits, 1)).sum(1).mean()
