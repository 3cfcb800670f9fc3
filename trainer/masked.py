"""Convolutions and linear layers whose filters are masked by trainable thresholds.

SpaFL (arXiv 2406.00431): score_i = mean_j |W_ij| / scale, mask_i = 1[score_i > tau_i], forward uses W * mask. The
step function has no useful gradient, so backward lets it pass straight through: d mask / d(score - tau) := 1.
"""

from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

StraightThrough: TypeAlias = Literal["identity", "cifar-release"]


def straight_through(distance: Tensor, ste: StraightThrough, gate: bool = False) -> Tensor:
    """Returns 1.0 where `distance` = score - tau (out,) is above 0, else 0.0, with the surrogate's gradient.

    gate: the gradient is 0 where the mask is.

    identity       d mask / d distance = 1: the paper, and the published FMNIST code
    cifar-release  d mask / d distance = 1[|distance| > 1]: the published CIFAR code, in which the task hardly ever
                   moves a threshold

    Written with detach, not as an autograd.Function: torch.export drops those without a word.
    """
    hard = (distance > 0).to(distance.dtype)
    # exactly 0 in forward; the whole gradient in backward
    soft = distance - distance.detach()
    if ste == "cifar-release":
        soft = soft * (distance.detach().abs() > 1).to(distance.dtype)
    if gate:
        soft = soft * hard.detach()
    return hard.detach() + soft


class _Masked(nn.Module):
    """What masked layers share. `weight` (out, ...) and `threshold` (out,) are both trained.

    gate   as if the layer's output were multiplied by its detached mask: a pruned channel is exactly 0, bias and all,
           and receives exactly no task gradient. Off where the norm behind the layer gates instead, or as published.
    scale  the unit of the thresholds (`spafl.layout.Layer`)
    """

    weight: Tensor
    bias: Tensor | None
    threshold: nn.Parameter
    gate: bool
    ste: StraightThrough
    scale: float

    def distance(self) -> Tensor:
        """Returns score - tau (out,): positive where the filter is active."""
        # mean |w| / scale, with one division of (out,) each way instead of one of the whole weight
        weights = self.weight[0].numel()
        return self.weight.abs().flatten(1).sum(1) / (weights * self.scale) - self.threshold

    def active(self) -> Tensor:
        """Returns the mask (out,) as detached 0.0 / 1.0."""
        distance = self.distance().detach()
        return (distance > 0).to(distance.dtype)

    def mask(self) -> Tensor:
        """Returns the mask (out,), 0.0 or 1.0, differentiable in W and the thresholds; gated, only where it is 1."""
        return straight_through(self.distance(), self.ste, self.gate)

    def masked_weight(self) -> Tensor:
        """Returns W * mask, of W's shape, differentiable in W and the thresholds."""
        return self.weight * self.mask().view(-1, *[1] * (self.weight.dim() - 1))

    def masked_bias(self) -> Tensor | None:
        """Returns the bias (out,), 0 where the layer's gate is shut; None without one."""
        return self.bias * self.active() if self.gate and self.bias is not None else self.bias

    def _become_masked(self, layer: nn.Module, ste: StraightThrough, scale: float, gate: bool) -> None:
        # the very same parameters: an optimizer that already holds them goes on working
        self.weight, self.bias = layer.weight, layer.bias  # type: ignore[assignment]
        self.threshold = nn.Parameter(self.weight.new_zeros(len(self.weight)))
        self.ste, self.scale, self.gate = ste, scale, gate
        self.train(layer.training)


class _MaskedConv(_Masked):
    """What masked convolutions of one and two dimensions share; made from ordinary ones."""

    def __init__(
        self,
        layer: nn.Conv1d | nn.Conv2d,
        *,
        ste: StraightThrough = "identity",
        scale: float = 1.0,
        gate: bool = True,
    ) -> None:
        super().__init__(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            layer.dilation,
            layer.groups,
            layer.bias is not None,
            layer.padding_mode,
            device="meta",
        )
        self._become_masked(layer, ste, scale, gate)

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, L) or (N, C_in, H, W)
        """Returns the convolution with the masked weight, (N, C_out, L') or (N, C_out, H', W')."""
        y: Tensor = self._conv_forward(x, self.masked_weight(), self.masked_bias())  # type: ignore[operator]
        return y


class MaskedConv1d(_MaskedConv, nn.Conv1d):
    """A Conv1d whose filters are masked; made from an ordinary one, whose parameters it takes over."""


class MaskedConv2d(_MaskedConv, nn.Conv2d):
    """A Conv2d whose filters are masked; made from an ordinary one, whose parameters it takes over."""


class MaskedLinear(_Masked, nn.Linear):  # type: ignore[misc]
    """A Linear whose neurons are masked; made from an ordinary one, whose parameters it takes over."""

    def __init__(
        self, layer: nn.Linear, *, ste: StraightThrough = "identity", scale: float = 1.0, gate: bool = True
    ) -> None:
        nn.Linear.__init__(self, layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        self._become_masked(layer, ste, scale, gate)

    def forward(self, x: Tensor) -> Tensor:  # (..., in)
        """Returns the linear map with the masked weight, (..., out)."""
        return self.mapped(x, self.weight)

    def mapped(self, x: Tensor, weight: Tensor) -> Tensor:
        """Returns the linear map of x (..., k) with `weight` (out, k), W or some of its columns, masked by W's mask."""
        if x.dim() > 2:
            return F.linear(x, weight * self.mask()[:, None], self.masked_bias())
        # a row of the weight is a column of the output, which a batch makes smaller: no pass over the weight for the
        # mask, nor for its gradient
        y = F.linear(x, weight) * self.mask()
        bias = self.masked_bias()
        return y if bias is None else y + bias


Masked: TypeAlias = MaskedConv1d | MaskedConv2d | MaskedLinear
