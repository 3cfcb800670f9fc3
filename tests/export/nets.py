"""Random small networks of what people build convolutional models from, right to the odd options of each part."""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from hypothesis import reject
from hypothesis import strategies as st
from torch import Tensor, nn

LABELS = 3

Part: TypeAlias = nn.Module | Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Callable[[], Part]] = {
    "nn.ReLU": nn.ReLU,
    "F.relu": lambda: F.relu,
    "x.relu": lambda: lambda x: x.relu(),
    "F.gelu": lambda: F.gelu,
    "nn.SiLU": nn.SiLU,
    "torch.tanh": lambda: torch.tanh,
    "nn.LeakyReLU": partial(nn.LeakyReLU, 0.3),
    "F.elu": lambda: lambda x: F.elu(x, 0.5),
    "nn.Sigmoid": nn.Sigmoid,
    "x.sigmoid": lambda: lambda x: x.sigmoid(),
    "F.softplus": lambda: lambda x: F.softplus(x, beta=2.0),
    "nn.Hardsigmoid": nn.Hardsigmoid,
    "x * 2": lambda: lambda x: x * 2,
    "none": lambda: lambda x: x,
}
POOLS: dict[str, Callable[[], Part]] = {
    "none": lambda: lambda x: x,
    "max": lambda: lambda x: F.max_pool2d(x, 2),
    "max, padded and overlapping": lambda: nn.MaxPool2d(3, 2, padding=1),
    "average": lambda: nn.AvgPool2d(2),
    "average, padded": lambda: lambda x: F.avg_pool2d(x, 3, 2, 1),
    "average, padding not counted": lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    "average, last windows partial": lambda: nn.AvgPool2d(2, ceil_mode=True),
    "average, divided by 3": lambda: lambda x: F.avg_pool2d(x, 2, divisor_override=3),
    "average of 2 x 2 areas": lambda: nn.AdaptiveAvgPool2d(2),
    "largest of 2 x 2 areas": lambda: lambda x: F.adaptive_max_pool2d(x, 2),
}
FLATTENS: dict[str, Callable[[int], Part]] = {
    "torch.flatten": lambda size: lambda x: torch.flatten(x, 1),
    "nn.Flatten": lambda size: nn.Flatten(),
    "x.flatten": lambda size: lambda x: x.flatten(1),
    "x.view(x.size(0), -1)": lambda size: lambda x: x.view(x.size(0), -1),
    "x.reshape(x.shape[0], -1)": lambda size: lambda x: x.reshape(x.shape[0], -1),
    "x.view(-1, size)": lambda size: lambda x: x.view(-1, size),
    "x.reshape(-1, sizes)": lambda size: lambda x: x.reshape(-1, x.size(1) * x.size(2) * x.size(3)),
    "channels last": lambda size: lambda x: x.permute(0, 2, 3, 1).reshape(x.size(0), -1),
}


class Chain(nn.Module):
    """Modules and functions one after the other."""

    def __init__(self, parts: list[Part]) -> None:
        super().__init__()
        self.parts = parts
        for number, part in enumerate(parts):
            if isinstance(part, nn.Module):
                self.add_module(f"part{number}", part)

    def forward(self, x: Tensor) -> Tensor:
        for number, part in enumerate(self.parts):
            # by attribute: sparsify exchanges the module there
            x = getattr(self, f"part{number}")(x) if isinstance(part, nn.Module) else part(x)
        return x


class Fork(nn.Module):
    """Two ways from one value, added up at the end; an empty way is a shortcut."""

    def __init__(self, one: nn.Module, other: nn.Module) -> None:
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


class Net(Chain):
    """A chain that knows the shape it takes, and what it was made of."""

    def __init__(self, parts: list[Part], shape: tuple[int, int, int], made_of: list[str]) -> None:
        super().__init__(parts)
        self.shape, self.made_of = shape, made_of

    def __repr__(self) -> str:
        return f"Net({self.shape}: {', '.join(self.made_of)})"


@st.composite
def nets(draw: st.DrawFn) -> Net:
    """Returns a network that takes its `shape` and tells LABELS labels apart, weights drawn by torch's own state."""

    made_of: list[str] = []

    def choose(options: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
        made_of.append(draw(st.sampled_from(list(options))))
        return options[made_of[-1]]

    def convolution(channels: int, out: int, *, same: bool) -> list[Part]:
        kernel = 3 if same else draw(st.sampled_from([1, 2, 3]))
        layer = nn.Conv2d(
            channels,
            out,
            kernel,
            stride=1 if same else draw(st.sampled_from([1, 1, 2])),
            padding=1 if same else draw(st.integers(0, kernel - 1)),
            dilation=1 if same else draw(st.sampled_from([1, 1, 2])),
            bias=draw(st.booleans()),
            groups=2 if channels % 2 == out % 2 == 0 and draw(st.integers(0, 5)) == 0 else 1,
            padding_mode=draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect"])),
        )
        norm = [nn.BatchNorm2d(out, affine=draw(st.booleans()))] if draw(st.booleans()) else []
        made_of.extend(str(part) for part in (layer, *norm))
        return [layer, *norm, choose(ACTIVATIONS)()]

    shape = (draw(st.integers(1, 3)), draw(st.integers(9, 12)), draw(st.integers(9, 12)))
    channels, parts = shape[0], list[Part]()
    for _ in range(draw(st.integers(1, 2))):
        out = draw(st.integers(2, 6))
        parts += [*convolution(channels, out, same=False), choose(POOLS)()]
        channels = out
        if draw(st.integers(0, 2)) == 0:
            made_of.append("fork")
            ways = [
                Chain([choose(ACTIVATIONS)(), *convolution(channels, channels, same=True)])
                if draw(st.booleans())
                else Chain([])
                for _ in (0, 1)
            ]
            parts.append(Fork(*ways))
    try:
        with torch.no_grad():
            features = Chain(parts)(torch.zeros(2, *shape))[0].numel()
    except RuntimeError:
        reject()  # shrunk to less than a kernel needs
    parts.append(choose(FLATTENS)(features))
    if draw(st.booleans()):
        hidden = draw(st.integers(2, 6))
        norm = [nn.BatchNorm1d(hidden)] if draw(st.booleans()) else []
        made_of.append("hidden layer" + " with norm" * len(norm))
        parts += [nn.Linear(features, hidden, bias=draw(st.booleans())), *norm, choose(ACTIVATIONS)()]
        features = hidden
    parts.append(nn.Linear(features, LABELS, bias=draw(st.booleans())))
    return Net(parts, shape, made_of)
