"""Local training in eager PyTorch: the reference every engine is compared with.

    begin_round     catch up to the global thresholds, reset collapsed layers
    sgd_step        one step of SGD with momentum on weights and thresholds together
    train_locally   epochs of such steps; momentum starts at 0

Notation of SpaFL (arXiv 2406.00431, section 3): W (out, n_in) weights, tau (out,) thresholds of a layer.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from spafl.algorithm import COLLAPSE_DENSITY
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats
from trainer.sparsify import layout_of, masked_layers

CLIP_EPSILON = 1e-6
"""Added to the norm before dividing, as torch.nn.utils.clip_grad_norm_ does."""

Momenta: TypeAlias = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """One step: mean task loss of the batch before it, and how many examples were classified rightly."""

    loss: float
    correct: int


@dataclass(frozen=True, slots=True)
class Training:
    """What local training did.

    losses    task loss of each step
    loss      mean task loss per example over the last epoch; accuracy the share of it classified rightly, as trained
    density   share of active filters by layer afterwards
    steps     steps done; `dropped` examples that stood alone in a batch, which batch norm cannot train on
    """

    losses: tuple[float, ...]
    loss: float
    accuracy: float
    density: dict[str, float]
    steps: int
    dropped: int


@torch.no_grad()
def begin_round(model: nn.Module, base: Floats, target: Floats) -> tuple[str, ...]:
    """Returns the layers reset because they had collapsed, after catching up from thresholds `base` to `target`.

    base, target   (size,) in the order of `layout_of(model)`; the model is changed in place

    The same as `spafl.algorithm.apply_global` and `reset_collapsed`, in torch.
    """
    layers, collapsed = masked_layers(model), []
    for layer in layout_of(model).layers:
        masked = layers[layer.name]
        change = torch.from_numpy((target - base)[layer.span]) * (layer.scale / layer.n_scale)  # (out,)
        direction = masked.weight.flatten(1).sum(1).sign()  # (out,)
        masked.weight -= (direction * change).view(-1, *[1] * (masked.weight.dim() - 1))
        masked.threshold.copy_(torch.from_numpy(target[layer.span]))
        if float(masked.active().mean()) <= COLLAPSE_DENSITY:
            masked.threshold.zero_()
            collapsed.append(layer.name)
    return tuple(collapsed)


def zero_momenta(model: nn.Module) -> Momenta:
    """Returns a momentum of 0 for every trained tensor: what a round starts with."""
    return {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}


def sgd_step(
    model: nn.Module, momenta: Momenta, x: Tensor, y: Tensor, hyperparameters: Hyperparameters
) -> Step:
    """Returns the loss of one batch; the model and `momenta` are changed in place.

    x   (N, *shape) float32
    y   (N,) int64
    """
    h = hyperparameters
    parameters = dict(model.named_parameters())
    thresholds = {f"{name}.threshold": layer.threshold for name, layer in masked_layers(model).items()}

    model.train()
    logits = model(x)  # (N, labels)
    task = F.cross_entropy(logits, y)
    # sum_l sum_i exp(-tau_i): the only thing that moves a threshold whatever the data say
    penalty = sum((torch.exp(-tau).sum() for tau in thresholds.values()), logits.new_zeros(()))
    gradients = torch.autograd.grad(
        task + h.coeff * penalty, list(parameters.values()), materialize_grads=True
    )

    factor = 1.0
    if h.clip is not None:
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))
        factor = min(1.0, h.clip / (norm + CLIP_EPSILON))
    threshold_lr = h.lr if h.threshold_lr is None else h.threshold_lr
    with torch.no_grad():
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
            momenta[name].mul_(h.momentum).add_(gradient, alpha=factor)  # v = mu v + g
            parameter.sub_(momenta[name], alpha=threshold_lr if name in thresholds else h.lr)  # w = w - lr v
    return Step(task.item(), int((logits.argmax(1) == y).sum()))


def batches(examples: int, batch_size: int, epochs: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yields the examples' indices batch by batch, in a new order each epoch; an epoch's last batch may be smaller."""
    draw = np.random.default_rng(seed)
    for _ in range(epochs):
        order = draw.permutation(examples)
        for start in range(0, examples, batch_size):
            yield order[start : start + batch_size]


def train_locally(
    model: nn.Module,
    x: Floats,
    y: NDArray[np.int64],
    hyperparameters: Hyperparameters,
    *,
    seed: int = 0,
    order: Iterable[NDArray[np.int64]] | None = None,
) -> Training:
    """Returns what training on `x` (n, *shape) and `y` (n,) did; the model is changed in place.

    hyperparameters   in force this round (`Hyperparameters.at`)
    order             index batches of all epochs in place of those `seed` gives
    """
    h = hyperparameters
    images, labels = torch.from_numpy(x), torch.from_numpy(y)
    per_epoch = math.ceil(len(y) / h.batch_size)
    alone_is_useless = any(isinstance(module, _BatchNorm) for module in model.modules())

    momenta = zero_momenta(model)  # once a round: made anew for each batch, momentum would do nothing
    done: list[tuple[int, Step]] = []  # batch size and outcome of each step
    dropped, last_epoch = 0, 0
    for number, indices in enumerate(
        batches(len(y), h.batch_size, h.epochs, seed) if order is None else order
    ):
        if number % per_epoch == 0:
            last_epoch = len(done)
        if len(indices) == 1 and alone_is_useless:
            dropped += 1
            continue
        chosen = torch.from_numpy(indices)
        done.append((len(indices), sgd_step(model, momenta, images[chosen], labels[chosen], h)))

    seen = sum(size for size, _ in done[last_epoch:])
    return Training(
        losses=tuple(step.loss for _, step in done),
        loss=sum(size * step.loss for size, step in done[last_epoch:]) / seen if seen else math.nan,
        accuracy=sum(step.correct for _, step in done[last_epoch:]) / seen if seen else math.nan,
        density=densities(model),
        steps=len(done),
        dropped=dropped,
    )


def densities(model: nn.Module) -> dict[str, float]:
    """Returns the share of active filters by layer, in layout order."""
    layers = masked_layers(model)
    return {layer.name: float(layers[layer.name].active().mean()) for layer in layout_of(model).layers}


@torch.no_grad()
def evaluate(
    model: nn.Module, x: Floats, y: NDArray[np.int64], *, batch_size: int = 512
) -> tuple[float, float]:
    """Returns the mean task loss and the accuracy on `x` (n, *shape), n > 0; the model stays as it is."""
    was_training, loss, correct = model.training, 0.0, 0
    model.eval()
    for start in range(0, len(y), batch_size):
        labels = torch.from_numpy(y[start : start + batch_size])
        logits = model(torch.from_numpy(x[start : start + batch_size]))
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        correct += int((logits.argmax(1) == labels).sum())
    model.train(was_training)
    return loss / len(y), correct / len(y)
