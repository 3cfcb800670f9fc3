"""Which client has which examples.

The paper's recipe (section 5 and the published split code): for each label, shares drawn from Dirichlet(alpha, ...,
alpha) over the clients; training and test examples of the label are dealt out in these same shares, so that a client
is tested on what it trains on. The smaller alpha, the fewer labels a client has.
"""

from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spafl.errors import SettingsError
from trainer.data.dataset import Ints, Split
from trainer.errors import DataError

MAX_FILE_BYTES = 256 << 20
DRAWS = 100
"""Draws of the shares before the last one is repaired by hand."""

Index: TypeAlias = Annotated[int, Field(ge=0)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class Client(_Frozen):
    """One client's examples, as indices into the training and the test examples of the source."""

    train: tuple[Index, ...]
    test: tuple[Index, ...]


class Partition(_Frozen):
    """The clients of a dataset, and everything that makes them again: no example is with two of them.

    alpha    of the Dirichlet distribution; None dealt out independently and identically
    minimum  training examples every client has at least
    source   `Split.digest` of the dataset whose indices these are
    """

    format: Literal["spafl-partition"] = "spafl-partition"
    format_version: Literal[1] = 1
    alpha: float | None
    seed: int
    minimum: int
    source: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    clients: tuple[Client, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _disjoint(self) -> Self:
        for part in ("train", "test"):
            indices = [index for client in self.clients for index in getattr(client, part)]
            if len(set(indices)) != len(indices):
                raise ValueError(f"a {part} example is with more than one client")
        return self

    def of(self, split: Split) -> list[Split]:
        """Returns each client's examples.

        Raises:
            DataError: `split` is not the dataset this partition was made from.
        """
        if (digest := split.digest()) != self.source:
            raise DataError(
                f"the partition was made from dataset {self.source[:12]}, this is {digest[:12]}: "
                "same source, --limit and --seed?"
            )
        return [
            split.take(np.array(client.train, np.int64), np.array(client.test, np.int64))
            for client in self.clients
        ]

    def save(self, path: Path) -> None:
        """Returns nothing; writes the partition as JSON."""
        path.write_text(self.model_dump_json() + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Returns the partition `save` wrote.

        Raises:
            DataError: no such file, longer than `MAX_FILE_BYTES`, not a partition, or contradicting itself.
        """
        try:
            if (size := path.stat().st_size) > MAX_FILE_BYTES:
                raise DataError(f"{path} has {size} bytes, expected at most {MAX_FILE_BYTES}")
            return cls.model_validate_json(path.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {path}: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "partition"
            raise DataError(f"{path} is not a partition: {where}: {first['msg']}") from error


def partition(
    split: Split, clients: int, *, alpha: float | None = 0.5, seed: int = 0, minimum: int = 10
) -> Partition:
    """Returns `split` dealt out to `clients`: every example to exactly one, the same for the same seed.

    Shares are drawn anew while a client stays below `minimum` training examples or without a test example. If that
    does not help, the largest clients hand over what is missing, labels the receiver has first.

    Raises:
        SettingsError: a number out of range, or more asked for than there are examples.
    """
    if clients < 1 or minimum < 1 or seed < 0 or (alpha is not None and not 1e-3 <= alpha <= 1e6):
        raise SettingsError(
            f"expected at least 1 client and example, a seed of at least 0 and alpha of 0.001 to 1e6, got "
            f"clients={clients}, minimum={minimum}, seed={seed}, alpha={alpha}"
        )
    if clients * minimum > len(split.train) or clients > len(split.test):
        raise SettingsError(
            f"{clients} clients of at least {minimum} training examples and 1 test example need "
            f"{clients * minimum} and {clients}, the dataset has {len(split.train)} and {len(split.test)}"
        )
    draw = np.random.default_rng(seed)
    for _ in range(DRAWS):
        train, test = _deal(split, clients, alpha, draw)
        if min(map(len, train)) >= minimum and min(map(len, test)) >= 1:
            break
    labels = len(split.train.labels)
    _top_up(train, split.train.y, minimum, train, split.train.y, labels)
    _top_up(test, split.test.y, 1, train, split.train.y, labels)
    dealt = tuple(
        Client(train=tuple(sorted(own)), test=tuple(sorted(held)))
        for own, held in zip(train, test, strict=True)
    )
    return Partition(alpha=alpha, seed=seed, minimum=minimum, source=split.digest(), clients=dealt)


def _deal(
    split: Split, clients: int, alpha: float | None, draw: np.random.Generator
) -> tuple[list[list[int]], list[list[int]]]:
    """Returns each client's training and test indices by one draw of the shares."""
    if alpha is None:
        train, test = (
            [list(map(int, part)) for part in np.array_split(draw.permutation(len(data)), clients)]
            for data in (split.train, split.test)
        )
        return train, test
    train, test = [[] for _ in range(clients)], [[] for _ in range(clients)]
    for label in range(len(split.train.labels)):
        ends = np.cumsum(draw.dirichlet(np.full(clients, alpha)))[:-1]
        for dealt, y in ((train, split.train.y), (test, split.test.y)):
            indices = draw.permutation(np.nonzero(y == label)[0])
            for own, part in zip(dealt, np.split(indices, (ends * len(indices)).astype(int)), strict=True):
                own.extend(map(int, part))
    return train, test


def _top_up(
    parts: list[list[int]], y: Ints, minimum: int, liked: list[list[int]], liked_y: Ints, labels: int
) -> None:
    """Moves examples in `parts` from the largest to the smallest client until each has `minimum`.

    What moves has the label the receiver has most training examples (`liked`) of, as far as the giver has any.
    """
    while len(smallest := min(parts, key=len)) < minimum:
        receiver, largest = parts.index(smallest), max(parts, key=len)
        wanted: NDArray[np.int64] = np.bincount(liked_y[liked[receiver]], minlength=labels)
        smallest.append(largest.pop(int(np.argmax(wanted[y[largest]]))))
