"""Batch normalisation behind a masked layer: it gates, and its statistics rest while a channel is pruned.

Without the gate a pruned filter still leaves its norm as beta - gamma * mu / sigma, and in training its batch
variance of 0 makes the gradient 1 / sqrt(eps), some 316 times, too large.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spafl.errors import SettingsError
from trainer.masked import Masked, MaskedLinear

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d


def normalise(norm: BatchNorm, x: Tensor, active: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x normalised by its own batch's statistics, and the running mean and variance (C,) that follow.

    active  (C,) 0 or 1: channels to gate; they come out as 0 and keep their running statistics

    Writes nothing, so that it can be traced; `x` is (N, C), (N, C, L) or (N, C, H, W), more than one
    value per channel. The running variance is the unbiased one, as torch keeps it.
    """
    weight, bias = _gate(norm, active)
    y, mean, inverse = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, norm.eps)
    mean, inverse = mean.detach(), inverse.detach()
    count = x.numel() // x.shape[1]
    variance = (1 / (inverse * inverse) - norm.eps) * (count / (count - 1))
    m = norm.momentum
    if m is None or norm.running_mean is None or norm.running_var is None:
        raise SettingsError("a batch norm needs momentum and running statistics to be trained on devices")
    mean, variance = (1 - m) * norm.running_mean + m * mean, (1 - m) * norm.running_var + m * variance
    if active is not None:
        mean = torch.where(active > 0, mean, norm.running_mean)
        variance = torch.where(active > 0, variance, norm.running_var)
    return y, mean, variance


def _gate(norm: BatchNorm, active: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns the norm's weight and bias times the gate: the same as gating its output, for a pass less each way."""
    if active is None:
        return norm.weight, norm.bias
    weight = active if norm.weight is None else norm.weight * active
    return weight, None if norm.bias is None else norm.bias * active


class _Gated(nn.Module):
    """A batch norm that multiplies its output by the detached mask of the masked layer before it."""

    def follow(self, norm: BatchNorm, source: Masked, path: str) -> None:
        """Returns nothing; takes over `norm`'s parameters and statistics and follows `source`'s mask from now on.

        path   the norm's in its model, for messages
        """
        self.weight, self.bias = norm.weight, norm.bias
        self._buffers.update(norm._buffers)
        # a tuple, because a module assigned as it is would be registered, saved and trained a second time
        self._source, self._path = (source,), path
        self.train(norm.training)

    @property
    def source(self) -> Masked:
        """Returns the masked layer whose output this norm takes."""
        return self._source[0]

    def forward(self, x: Tensor) -> Tensor:
        """Returns the gated output, of x's shape; in training the running statistics are updated.

        Raises:
            SettingsError: behind a linear layer, a sequence, whose second axis holds positions and not the neurons.
        """
        if x.dim() > 2 and isinstance(self.source, MaskedLinear):
            raise SettingsError(
                f"batch norm {self._path!r} takes {tuple(x.shape)} from a linear layer: its channels are the second "
                "axis, not the layer's neurons. Use LayerNorm, or transpose before and after it"
            )
        active = self.source.active()
        if not self.training:
            weight, bias = _gate(self, active)  # type: ignore[arg-type]
            return F.batch_norm(x, self.running_mean, self.running_var, weight, bias, False, 0.0, self.eps)  # type: ignore[arg-type]
        y, mean, variance = normalise(self, x, active)  # type: ignore[arg-type]
        self.running_mean.copy_(mean.detach())  # type: ignore[operator]
        self.running_var.copy_(variance.detach())  # type: ignore[operator]
        return y


class GatedBatchNorm1d(_Gated, nn.BatchNorm1d):
    """BatchNorm1d behind a masked linear layer or 1-D convolution."""


class GatedBatchNorm2d(_Gated, nn.BatchNorm2d):
    """BatchNorm2d behind a masked 2-D convolution."""


GatedBatchNorm = GatedBatchNorm1d | GatedBatchNorm2d


def gated(norm: BatchNorm, source: Masked, path: str = "") -> GatedBatchNorm:
    """Returns a gated norm with `norm`'s parameters and statistics, following `source`'s mask; `path` is its own."""
    cls = GatedBatchNorm2d if isinstance(norm, nn.BatchNorm2d) else GatedBatchNorm1d
    new = cls(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats, device="meta"
    )
    new.follow(norm, source, path)
    return new
