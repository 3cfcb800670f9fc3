"""ResNet-18 for 32x32 images, as in the paper's CIFAR-100 run."""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with norms, added to their input; projected by a 1x1 convolution where shapes differ."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != out:
            project = nn.Conv2d(channels, out, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        """Returns (N, out, H / stride, W / stride)."""
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet18(nn.Module):
    """Eight basic blocks in four stages, behind a 3x3 stem without a pool."""

    shape = (3, 32, 32)

    def __init__(
        self,
        labels: int = 10,
        *,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        blocks: int = 2,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        stages, channels = [], widths[0]
        for number, width in enumerate(widths):
            for block in range(blocks):
                stages.append(BasicBlock(channels, width, 2 if number and block == 0 else 1))
                channels = width
        self.stages, self.head = nn.Sequential(*stages), nn.Linear(channels, labels)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, 32, 32)
        """Returns logits (N, labels)."""
        x = self.stages(F.relu(self.norm(self.stem(x))))  # (N, 512, 4, 4)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]
