"""A small MobileNetV2 (arXiv 1801.04381) for 32x32 images: depthwise convolutions between pointwise ones."""

import torch.nn.functional as F
from torch import Tensor, nn


class InvertedResidual(nn.Module):
    """1x1 to more channels, depthwise 3x3, 1x1 back without activation; added to its input where shapes allow."""

    def __init__(self, channels: int, out: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.expand, self.norm1 = nn.Conv2d(channels, wide, 1, bias=False), nn.BatchNorm2d(wide)
        self.depthwise = nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.project, self.norm3 = nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)
        self.residual = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        """Returns (N, out, H / stride, W / stride)."""
        y = F.relu6(self.norm1(self.expand(x)))
        y = F.relu6(self.norm2(self.depthwise(y)))
        y = self.norm3(self.project(y))
        return x + y if self.residual else y  # type: ignore[no-any-return]


class MobileNet(nn.Module):
    """A stem, four stages of inverted residuals, a 1x1 convolution, the mean of the pixels."""

    shape = (3, 32, 32)

    def __init__(
        self,
        labels: int = 10,
        *,
        stem: int = 16,
        # channels, blocks, stride of the first
        stages: tuple[tuple[int, int, int], ...] = ((16, 1, 1), (24, 2, 2), (32, 2, 2), (64, 2, 2)),
        expansion: int = 4,
        last: int = 128,
    ) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem)
        blocks, channels = [], stem
        for out, count, stride in stages:
            for number in range(count):
                blocks.append(InvertedResidual(channels, out, 1 if number else stride, expansion))
                channels = out
        self.blocks = nn.Sequential(*blocks)
        self.last, self.norm2 = nn.Conv2d(channels, last, 1, bias=False), nn.BatchNorm2d(last)
        self.head = nn.Linear(last, labels)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, 32, 32)
        """Returns logits (N, labels)."""
        x = self.blocks(F.relu6(self.norm1(self.stem(x))))  # (N, 64, 4, 4)
        x = F.relu6(self.norm2(self.last(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]
