"""Batch normalisation behind a masked layer: it gates, and its statistics rest while a channel is pruned.

Without the gate a pruned filter still leaves its norm as beta - gamma * mu / sigma, and in training its batch
variance of 0 makes the gradient 1 / sqrt(eps), some 316 times, too large.
"""

import torch
from torch import Tensor, nn

from spafl.errors import SettingsError
from trainer.masked import Masked

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


def normalise(norm: BatchNorm, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x normalised by its own batch's statistics, and the running mean and variance (C,) that follow.

    Writes nothing, so that it can be traced; `x` is (N, C) or (N, C, H, W) with N * H * W > 1. The running variance
    is the unbiased one, as torch keeps it.
    """
    y, mean, inverse = torch.native_batch_norm(x, norm.weight, norm.bias, None, None, True, 0.0, norm.eps)
    mean, inverse = mean.detach(), inverse.detach()
    count = x.numel() // x.shape[1]
    variance = (1 / (inverse * inverse) - norm.eps) * (count / (count - 1))
    m = norm.momentum
    if m is None or norm.running_mean is None or norm.running_var is None:
        raise SettingsError("a batch norm needs momentum and running statistics to be trained on devices")
    return y, (1 - m) * norm.running_mean + m * mean, (1 - m) * norm.running_var + m * variance


class _Gated(nn.Module):
    """A batch norm that multiplies its output by the detached mask of the masked layer before it."""

    def follow(self, norm: BatchNorm, source: Masked) -> None:
        """Returns nothing; takes over `norm`'s parameters and statistics and follows `source`'s mask from now on."""
        self.weight, self.bias = norm.weight, norm.bias
        self._buffers.update(norm._buffers)
        # a tuple, because a module assigned as it is would be registered, saved and trained a second time
        self._source = (source,)
        self.train(norm.training)

    @property
    def source(self) -> Masked:
        """Returns the masked layer whose output this norm takes."""
        return self._source[0]

    def functional(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gated output and the new running mean and variance (C,), where pruned channels kept theirs."""
        y, mean, variance = normalise(self, x)  # type: ignore[arg-type]
        active = self.source.active()
        mean = torch.where(active > 0, mean, self.running_mean)  # type: ignore[arg-type]
        variance = torch.where(active > 0, variance, self.running_var)  # type: ignore[arg-type]
        return y * active.view(-1, *[1] * (x.dim() - 2)), mean, variance

    def forward(self, x: Tensor) -> Tensor:
        """Returns the gated output, of x's shape; in training the running statistics are updated."""
        if not self.training:
            y: Tensor = super().forward(x)
            return y * self.source.active().view(-1, *[1] * (x.dim() - 2))
        y, mean, variance = self.functional(x)
        self.running_mean.copy_(mean.detach())  # type: ignore[operator]
        self.running_var.copy_(variance.detach())  # type: ignore[operator]
        return y


class GatedBatchNorm1d(_Gated, nn.BatchNorm1d):
    """BatchNorm1d behind a masked linear layer."""


class GatedBatchNorm2d(_Gated, nn.BatchNorm2d):
    """BatchNorm2d behind a masked convolution."""


GatedBatchNorm = GatedBatchNorm1d | GatedBatchNorm2d


def gated(norm: BatchNorm, source: Masked) -> GatedBatchNorm:
    """Returns a gated norm with `norm`'s parameters and statistics, following `source`'s mask."""
    cls = GatedBatchNorm2d if isinstance(norm, nn.BatchNorm2d) else GatedBatchNorm1d
    new = cls(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    new.follow(norm, source)
    return new
