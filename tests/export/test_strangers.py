"""What devices cannot train is refused by its path, with what to do, before anything is traced or written."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.build import export_bundle
from export.errors import LoweringError
from export.strangers import ADVICE, refuse_strangers
from spafl.manifest import InputSpec
from trainer.sparsify import sparsify


class Inside(nn.Module):
    """A module between two layers, two levels down."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.body = nn.Sequential(nn.ReLU(), part)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.first(x)))


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(3))


def frozen() -> nn.Module:
    return nn.Linear(4, 4).requires_grad_(False)


REFUSED = [
    (nn.GRU(4, 4), "module 'body.1' is a GRU: recurrent layers .* use Conv1d, or attention by Linear"),
    (nn.LSTM(4, 4), "module 'body.1' is a LSTM"),
    (nn.RNNCell(4, 4), "module 'body.1' is a RNNCell"),
    (
        nn.MultiheadAttention(4, 2),
        "module 'body.1' is a MultiheadAttention: .* use a Linear each for query, key, value and output",
    ),
    (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), "module 'body.1' is a TransformerEncoderLayer"),
    (nn.ConvTranspose2d(4, 4, 3), "module 'body.1' is a ConvTranspose2d: .* use Upsample and a Conv"),
    (nn.ConvTranspose1d(4, 4, 3), "module 'body.1' is a ConvTranspose1d"),
    (nn.Conv3d(4, 4, 3), "module 'body.1' is a Conv3d: only one and two dimensions"),
    (nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), "module 'body.1' is a Conv1d: circular padding"),
    (nn.LazyLinear(4), "module 'body.1' is a LazyLinear: does not know its sizes yet"),
    (nn.EmbeddingBag(5, 4), "module 'body.1' is a EmbeddingBag: .* use Embedding and the mean"),
    (
        nn.Embedding(5, 4, max_norm=1.0),
        "module 'body.1' is a Embedding: max_norm, scale_grad_by_freq and sparse",
    ),
    (nn.Embedding(5, 4, scale_grad_by_freq=True), "switch them off"),
    (nn.LocalResponseNorm(2), "module 'body.1' is a LocalResponseNorm: .* use BatchNorm or GroupNorm"),
    (nn.RReLU(), "module 'body.1' is a RReLU: draws random numbers"),
    (nn.BatchNorm1d(4, momentum=None), "module 'body.1' is a BatchNorm1d: it needs momentum and running"),
    (nn.BatchNorm1d(4, track_running_stats=False), "module 'body.1' is a BatchNorm1d: it needs momentum"),
    (
        nn.InstanceNorm1d(4, track_running_stats=True),
        "module 'body.1' is a InstanceNorm1d: running statistics",
    ),
    (nn.Dropout(0.5), "dropout 'body.1' draws random numbers, which a graph cannot: leave it out"),
    (Counted(), "buffer 'body.1.seen': devices keep parameters and batch norm statistics only"),
    (frozen(), "parameter 'body.1.weight' is frozen: devices train them all"),
]


@pytest.mark.parametrize(("part", "words"), REFUSED, ids=[type(part).__name__ for part, _ in REFUSED])
def test_refused_by_its_path(part: nn.Module, words: str) -> None:
    with pytest.raises(LoweringError, match=words):
        refuse_strangers(Inside(part))


@pytest.mark.parametrize(
    "part",
    [
        nn.Dropout(0.0),
        nn.Embedding(5, 4, padding_idx=0),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm1d(4),
        nn.PReLU(),
    ],
    ids=lambda part: type(part).__name__,
)
def test_accepted(part: nn.Module) -> None:
    refuse_strangers(Inside(part))


def test_every_advice_says_what_to_do() -> None:
    assert all(": " in words or "use " in words for words in ADVICE.values())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.rnn, self.head = nn.Linear(4, 6), nn.GRU(6, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:  # (N, 7, 4)
        return self.head(self.rnn(self.first(x))[0].mean(1))


def test_nothing_is_written(tmp_path: Path) -> None:
    """sparsify itself leaves the layer alone: eager PyTorch trains it unmasked."""
    model = sparsify(Recurrent())
    model(torch.zeros(2, 7, 4)).sum().backward()
    assert model.rnn.weight_hh_l0.grad is not None
    spec = InputSpec(shape=(7, 4), mean=(0.0,) * 7, std=(1.0,) * 7)
    with pytest.raises(LoweringError, match="module 'rnn' is a GRU"):
        export_bundle(model, tmp_path / "bundle.zip", name="rnn", input=spec, labels=("a", "b"))
    assert not list(tmp_path.iterdir())
