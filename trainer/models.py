"""The paper's models, as ordinary PyTorch; `sparsify` makes them masked."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNet5(nn.Module):
    """LeNet-5 without biases: 430,500 weights in 580 filters and neurons, for 28x28 grey images."""

    shape = (1, 28, 28)

    def __init__(self, labels: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5, bias=False)
        self.conv2 = nn.Conv2d(20, 50, 5, bias=False)
        self.fc1 = nn.Linear(50 * 4 * 4, 500, bias=False)
        self.fc2 = nn.Linear(500, labels, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, 1, 28, 28)
        """Returns logits (N, labels)."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # (N, 20, 12, 12)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # (N, 50, 4, 4)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))  # type: ignore[no-any-return]


class Conv4(nn.Module):
    """Four 5x5 convolutions and three linear layers with batch norm, for 32x32 colour images."""

    shape = (3, 32, 32)

    def __init__(self, labels: int = 10) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 64, 5, bias=False), nn.BatchNorm2d(64)
        self.conv2, self.norm2 = nn.Conv2d(64, 64, 5, bias=False), nn.BatchNorm2d(64)
        self.conv3, self.norm3 = nn.Conv2d(64, 128, 5, bias=False), nn.BatchNorm2d(128)
        self.conv4, self.norm4 = nn.Conv2d(128, 128, 5, bias=False), nn.BatchNorm2d(128)
        self.fc1, self.norm5 = nn.Linear(128 * 2 * 2, 128, bias=False), nn.BatchNorm1d(128)
        self.fc2, self.norm6 = nn.Linear(128, 128, bias=False), nn.BatchNorm1d(128)
        self.fc3 = nn.Linear(128, labels, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, 32, 32)
        """Returns logits (N, labels)."""
        x = F.relu(self.norm1(self.conv1(x)))  # (N, 64, 28, 28)
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)  # (N, 64, 12, 12)
        x = F.relu(self.norm3(self.conv3(x)))  # (N, 128, 8, 8)
        x = F.max_pool2d(F.relu(self.norm4(self.conv4(x))), 2)  # (N, 128, 2, 2)
        x = F.relu(self.norm5(self.fc1(torch.flatten(x, 1))))
        x = F.relu(self.norm6(self.fc2(x)))
        return self.fc3(x)  # type: ignore[no-any-return]


class Block(nn.Module):
    """A transformer block: attention, then two linear layers, each behind a layer norm and added to its input."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, tokens, dim)
        """Returns x with what the block adds to it, of x's shape."""
        y = self.norm1(x)
        query, key, value = (self._by_head(layer(y)) for layer in (self.query, self.key, self.value))
        attended = F.scaled_dot_product_attention(query, key, value)  # (N, heads, tokens, dim / heads)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))  # type: ignore[no-any-return]

    def _by_head(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, 2, (self.heads, -1)).transpose(1, 2)


class ViT(nn.Module):
    """A vision transformer: 4 x 4 patches of 32 x 32 colour images, six blocks, the mean of their tokens."""

    shape = (3, 32, 32)

    def __init__(
        self, labels: int = 10, *, dim: int = 128, depth: int = 6, heads: int = 8, hidden: int = 256
    ) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, dim, 4, stride=4)
        self.position = nn.Parameter(torch.randn(1, 64, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, labels)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, 32, 32)
        """Returns logits (N, labels)."""
        tokens = self.embed(x).flatten(2).transpose(1, 2)  # (N, 64, dim)
        tokens = self.blocks(tokens + self.position)
        return self.head(self.norm(tokens.mean(1)))  # type: ignore[no-any-return]


MODELS: dict[str, Callable[..., nn.Module]] = {"lenet5": LeNet5, "conv4": Conv4, "vit": ViT}
"""Name on the command line -> constructor taking the number of labels; each has the input `shape` it expects."""
