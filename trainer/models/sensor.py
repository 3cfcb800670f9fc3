"""A 1-D convolutional network for windows of sensor samples."""

import torch.nn.functional as F
from torch import Tensor, nn


class CNN1d(nn.Module):
    """Three 1-D convolutions with norms, for nine channels of 128 samples, as UCI's HAR records them."""

    shape = (9, 128)

    def __init__(
        self, labels: int = 6, *, widths: tuple[int, int, int] = (32, 64, 64), hidden: int = 64
    ) -> None:
        super().__init__()
        one, two, three = widths
        self.conv1, self.norm1 = nn.Conv1d(9, one, 5, padding=2, bias=False), nn.BatchNorm1d(one)
        self.conv2, self.norm2 = nn.Conv1d(one, two, 5, padding=2, bias=False), nn.BatchNorm1d(two)
        self.conv3, self.norm3 = nn.Conv1d(two, three, 3, padding=1, bias=False), nn.BatchNorm1d(three)
        self.fc, self.head = nn.Linear(three * 16, hidden), nn.Linear(hidden, labels)

    def forward(self, x: Tensor) -> Tensor:  # (N, 9, 128)
        """Returns logits (N, labels)."""
        x = F.max_pool1d(F.relu(self.norm1(self.conv1(x))), 2)  # (N, 32, 64)
        x = F.max_pool1d(F.relu(self.norm2(self.conv2(x))), 2)  # (N, 64, 32)
        x = F.max_pool1d(F.relu(self.norm3(self.conv3(x))), 2)  # (N, 64, 16)
        return self.head(F.relu(self.fc(x.flatten(1))))  # type: ignore[no-any-return]
