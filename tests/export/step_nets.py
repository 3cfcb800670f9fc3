"""Random small networks to train a step of: 1-D and 2-D, every kind of convolution, norms, pools and residuals."""

from collections.abc import Callable
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.export.nets import Chain, Net, Part

LABELS = 3

CONVOLUTION = {1: nn.Conv1d, 2: nn.Conv2d}
ACTIVATIONS: list[Callable[[], Part]] = [
    nn.ReLU,
    nn.ReLU6,
    nn.GELU,
    nn.SiLU,
    nn.Tanh,
    nn.ELU,
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Softplus,
    lambda: nn.ReLU(inplace=True),
    lambda: nn.LeakyReLU(0.3),
    lambda: nn.Softmax(1),
    lambda: F.relu,
    nn.Identity,
]
NORMS: dict[int, list[Callable[[int], nn.Module]]] = {
    1: [nn.BatchNorm1d, lambda n: nn.BatchNorm1d(n, affine=False), lambda n: nn.GroupNorm(1, n)],
    2: [nn.BatchNorm2d, lambda n: nn.BatchNorm2d(n, affine=False), lambda n: nn.GroupNorm(1, n)],
}
POOLS: dict[int, list[Callable[[], nn.Module]]] = {
    1: [
        lambda: nn.MaxPool1d(2),
        lambda: nn.MaxPool1d(3, 2, padding=1),
        lambda: nn.MaxPool1d(2, 1, dilation=2),
        lambda: nn.AvgPool1d(2),
        lambda: nn.AvgPool1d(3, 2, padding=1, count_include_pad=False),
        lambda: nn.AvgPool1d(2, ceil_mode=True),
        lambda: nn.AdaptiveAvgPool1d(3),
        lambda: nn.AdaptiveMaxPool1d(1),
    ],
    2: [
        lambda: nn.MaxPool2d(2),
        lambda: nn.MaxPool2d((3, 2), 2, padding=1),
        lambda: nn.AvgPool2d(2),
        lambda: nn.AvgPool2d(3, 2, padding=1),
        lambda: nn.AvgPool2d(3, 2, padding=1, ceil_mode=True, count_include_pad=False),
        lambda: nn.AvgPool2d(2, divisor_override=3),
        lambda: nn.AdaptiveAvgPool2d((2, 3)),
        lambda: nn.AdaptiveMaxPool2d(1),
    ],
}


class Residual(nn.Module):
    """A branch added to its input, or to a projection of it where shapes differ."""

    def __init__(self, branch: nn.Module, project: nn.Module | None) -> None:
        super().__init__()
        self.branch, self.project = branch, project

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.branch(x) if self.project is None else self.project(x) + self.branch(x)
        return y


class Tokens(nn.Module):
    """Positions as tokens: linear layers with biases and a layer norm along the last axis, then their mean."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.fc1 = nn.LayerNorm(channels), nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:  # (N, C, ...)
        x = x.flatten(2).transpose(1, 2)
        return (x + self.fc2(F.gelu(self.fc1(self.norm(x))))).mean(1)


def step_net(seed: int) -> Net:
    """The network of a seed, with weights of that seed; odd seeds are 1-D."""
    draw, dimensions = Random(seed), 1 + (seed + 1) % 2
    torch.manual_seed(seed)
    made_of: list[str] = []

    def kept(part: Part) -> Part:
        made_of.append(str(part))
        return part

    def some(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randint(low, high) for _ in range(dimensions))

    def convolution(channels: int, out: int, *, same: bool = False) -> list[Part]:
        divisors = [n for n in range(1, channels + 1) if channels % n == out % n == 0]
        kernel = (3,) * dimensions if same else some(1, 3)
        layer = CONVOLUTION[dimensions](
            channels,
            out,
            kernel,  # type: ignore[arg-type]
            stride=1 if same else some(1, 2),  # type: ignore[arg-type]
            padding=1 if same else tuple(draw.randint(0, k - 1) for k in kernel),  # type: ignore[arg-type]
            dilation=1 if same else some(1, 2),  # type: ignore[arg-type]
            groups=draw.choice([1, 1, divisors[-1]]),
            bias=draw.random() < 0.5,
            padding_mode=draw.choice(["zeros", "zeros", "zeros", "replicate"]),
        )
        parts = [layer, draw.choice(NORMS[dimensions])(out)] if draw.random() < 0.6 else [layer]
        return [*map(kept, parts), kept(draw.choice(ACTIVATIONS)())]

    while True:
        made_of.clear()
        shape = (draw.randint(1, 3), *(draw.randint(9, 13) for _ in range(dimensions)))
        channels, out = draw.randint(2, 6), draw.randint(2, 6)
        parts = convolution(shape[0], channels)
        if draw.random() < 0.5:
            same = draw.random() < 0.5
            project = None if same else CONVOLUTION[dimensions](channels, out, 1)
            after = channels if same else out
            parts.append(Residual(Chain(convolution(channels, after, same=True)), project))
            made_of.append("added to its input" if same else "added to a projection")
            channels = after
        parts.append(kept(draw.choice(POOLS[dimensions])()))
        try:
            features = Chain(parts)(torch.randn(2, *shape))
        except RuntimeError:
            continue  # shrunk to less than a kernel needs
        if features.shape[2:].numel() == 0:
            continue
        if draw.random() < 0.4:
            parts.append(kept(Tokens(channels, 5)))
            width = channels
        else:
            parts.append(nn.Flatten())
            width = features[0].numel()
        if draw.random() < 0.4:
            norm = [kept(nn.BatchNorm1d(7))] if draw.random() < 0.5 else []
            parts += [nn.Linear(width, 7), *norm, kept(draw.choice(ACTIVATIONS)())]
            width = 7
        return Net([*parts, nn.Linear(width, LABELS)], shape, made_of)  # type: ignore[arg-type]
