"""Chains of convolutions and linear layers: the paper's LeNet-5 and Conv4, and a net of linear layers alone."""

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


class MLP(nn.Module):
    """Three linear layers with biases, for 28x28 grey images."""

    shape = (1, 28, 28)

    def __init__(self, labels: int = 10, *, hidden: tuple[int, int] = (200, 100)) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(28 * 28, hidden[0]), nn.Linear(*hidden)
        self.head = nn.Linear(hidden[1], labels)

    def forward(self, x: Tensor) -> Tensor:  # (N, 1, 28, 28)
        """Returns logits (N, labels)."""
        x = F.relu(self.fc1(torch.flatten(x, 1)))
        return self.head(F.relu(self.fc2(x)))  # type: ignore[no-any-return]
