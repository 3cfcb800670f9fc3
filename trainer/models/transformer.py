"""Transformer encoders: the paper's ViT, and a text classifier of the same blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


class TextClassifier(nn.Module):
    """A transformer encoder of 64 token ids, which arrive as numbers: two blocks, the mean of their tokens."""

    shape = (64,)

    def __init__(
        self,
        labels: int = 4,
        *,
        vocabulary: int = 4000,
        length: int = 64,
        dim: int = 64,
        depth: int = 2,
        heads: int = 4,
        hidden: int = 128,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.position = nn.Parameter(torch.randn(1, length, dim) * 0.02)
        self.blocks = nn.Sequential(*(Block(dim, heads, hidden) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, labels)

    def forward(self, x: Tensor) -> Tensor:  # (N, 64), whole numbers
        """Returns logits (N, labels)."""
        tokens = self.embed(x.long()) + self.position  # (N, 64, dim)
        return self.head(self.norm(self.blocks(tokens).mean(1)))  # type: ignore[no-any-return]
