"""What a model may not hold, because devices could not train it: found by its type, and named by its path."""

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.rnn import RNNBase, RNNCellBase

from export.errors import LoweringError
from export.flow import BatchNorm

ADVICE: dict[tuple[type, ...], str] = {
    (LazyModuleMixin,): "does not know its sizes yet: run the model once before it is returned",
    (
        RNNBase,
        RNNCellBase,
    ): "recurrent layers cannot be trained on devices yet: use Conv1d, or attention by Linear",
    (
        nn.MultiheadAttention,
        nn.Transformer,
        nn.TransformerEncoderLayer,
        nn.TransformerDecoderLayer,
    ): "its packed projections cannot be trained on devices yet: use a Linear each for query, key, value and output, "
    "which are masked then, and F.scaled_dot_product_attention",
    (_ConvTransposeNd,): "transposed convolutions cannot be trained on devices yet: use Upsample and a Conv",
    (
        nn.Conv3d,
        nn.BatchNorm3d,
    ): "only one and two dimensions can be trained on devices yet: work one into the channels",
    (nn.LocalResponseNorm,): "cannot be trained on devices yet: use BatchNorm or GroupNorm",
    (nn.EmbeddingBag,): "cannot be trained on devices yet: use Embedding and the mean of its vectors",
    (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d): "draws random numbers, which a graph cannot: "
    "use another activation or pool",
}
"""Modules without an exported form, and what to do."""


def refuse_strangers(model: nn.Module) -> None:
    """Returns nothing for a model of which devices can train every parameter and keep every buffer.

    Raises:
        LoweringError: they cannot; the message names the module, parameter or buffer, and what to do.
    """
    for name, module in model.named_modules():
        if (words := _unsupported(module)) is not None:
            raise LoweringError(f"module {name!r} is a {type(module).__name__}: {words}")
        if isinstance(module, _DropoutNd) and module.p > 0:
            raise LoweringError(f"dropout {name!r} draws random numbers, which a graph cannot: leave it out")
    statistics = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm)
        for leaf in ("running_mean", "running_var", "num_batches_tracked")
    }
    for name, _ in model.named_buffers():
        if name not in statistics:
            raise LoweringError(
                f"buffer {name!r}: devices keep parameters and batch norm statistics only; work it into the data"
            )
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            raise LoweringError(f"parameter {name!r} is frozen: devices train them all")


def _unsupported(module: nn.Module) -> str | None:
    """Returns what to do about a module that has no exported form; None if it has one."""
    for kinds, words in ADVICE.items():
        if isinstance(module, kinds):
            return words
    if isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    ):
        return "max_norm, scale_grad_by_freq and sparse cannot be trained on devices yet: switch them off"
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode == "circular":
        return "circular padding cannot be trained on devices yet: use zeros, reflect or replicate"
    if isinstance(module, BatchNorm) and (module.momentum is None or not module.track_running_stats):
        return "it needs momentum and running statistics to be trained on devices"
    if isinstance(module, _NormBase) and not isinstance(module, BatchNorm) and module.track_running_stats:
        return "running statistics are kept for batch norms only: track_running_stats=False"
    return None
