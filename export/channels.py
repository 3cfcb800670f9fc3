"""Channels that stay or go together.

A group is a set of channels that several values of a model share: what a layer makes, what activations and pools pass
on, what a sum adds up. Its channels are left out of all of them or of none.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product

from torch import fx

Live = frozenset[frozenset[str]]
"""When a channel has to stay: if for any of these sets the filters of all its layers are active."""


@dataclass(eq=False)
class Group:
    """Channels that stay or go together, and the layers with a filter for each.

    layers    masked layers, in the order they are called; the first gives the group its name
    others    layers with a filter for each channel that are not masked
    norms     batch norms right behind one of these layers, and which
    live      which channels have to stay
    blocks    parts of the channels, one after the other, that keep equally many: heads, or groups of a convolution
    readers   what reads the channels: module paths, and names of attention calls
    refusals  why all channels stay; none if pruned ones can be left out
    audible   why a pruned channel is not silent in training, or cannot be left out there; none if it can
    values    the nodes of the traced model that hold the channels
    depthwise convolutions among the layers that keep channels apart, whose number of groups is that of channels
    """

    width: int
    layers: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    norms: dict[str, str] = field(default_factory=dict)
    live: Live = frozenset()
    blocks: int = 1
    readers: list[str] = field(default_factory=list)
    refusals: dict[str, None] = field(default_factory=dict)
    audible: dict[str, None] = field(default_factory=dict)
    values: list[fx.Node] = field(default_factory=list)
    depthwise: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Returns the name of its first layer."""
        return self.layers[0] if self.layers else self.others[0] if self.others else ""

    @property
    def drops(self) -> bool:
        """Returns whether pruned channels are left out of inference."""
        return not self.refusals

    @property
    def exact(self) -> bool:
        """Returns whether training can do without a pruned channel: it is 0 where it is read, and gets no gradient."""
        return not self.refusals and not self.audible

    @property
    def refusal(self) -> str | None:
        """Returns why its channels all stay; None if pruned ones are left out."""
        return "; ".join(self.refusals) or None


@dataclass(frozen=True)
class Part:
    """A stretch of an axis: `columns` neighbours for each channel of a group."""

    group: Group
    columns: int = 1

    @property
    def size(self) -> int:
        """Returns the length of the stretch while all channels are there."""
        return self.group.width * self.columns


@dataclass(frozen=True)
class Channels:
    """Where the channels of a value are, and what one that is left out would be.

    axis    the axis they run over; where they are split into heads, the axis of the heads
    inner   the axis of each head's channels; None where they are not split
    parts   along the axis, in order
    zero    it would be exactly 0
    cut     and no gradient would reach it
    """

    axis: int
    parts: tuple[Part, ...]
    zero: bool
    cut: bool
    inner: int | None = None

    @property
    def single(self) -> Group | None:
        """Returns the one group whose channels these are, one entry each; None if there are more."""
        return self.parts[0].group if len(self.parts) == 1 and self.parts[0].columns == 1 else None

    @property
    def groups(self) -> Iterable[Group]:
        """Returns the groups of all parts."""
        return (part.group for part in self.parts)

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Returns channels and columns of each part."""
        return tuple((part.group.width, part.columns) for part in self.parts)


def either(one: Live, other: Live) -> Live:
    """Returns when a channel has to stay that is needed where `one` says so, and where `other` does."""
    found = one | other
    return frozenset(entry for entry in found if not any(less < entry for less in found))


def both(one: Live, other: Live) -> Live:
    """Returns when a channel has to stay that is needed only where `one` and `other` say so."""
    return either(frozenset(a | b for a, b in product(one, other)), frozenset())


def moved(held: Channels, places: Sequence[int | None]) -> Channels | None:
    """Returns the channels after axis i has gone to places[i]; None if theirs has gone."""
    axis = places[held.axis]
    inner = None if held.inner is None else places[held.inner]
    if axis is None or (held.inner is not None and inner is None):
        return None
    return dataclasses.replace(held, axis=axis, inner=inner)


def without(held: Channels, gone: Sequence[int]) -> Channels:
    """Returns the channels after other axes have gone."""
    axis = held.axis - sum(other < held.axis for other in gone)
    inner = None if held.inner is None else held.inner - sum(other < held.inner for other in gone)
    return dataclasses.replace(held, axis=axis, inner=inner)


def reshaped(held: Channels, old: tuple[int, ...], new: tuple[int, ...]) -> Channels | None:
    """Returns where channels are after a reshape, which keeps the order of all values; None if nowhere.

    They may move to another axis, be lined up with the positions behind them, be split into heads or put together.
    """
    before, size = math.prod(old[: held.axis]), old[held.axis]
    if held.inner is not None:
        if held.inner != held.axis + 1:
            return None
        heads, size = size, old[held.inner]
        for axis in range(len(new)):
            if math.prod(new[:axis]) != before:
                continue
            if new[axis] == heads * size:
                return dataclasses.replace(held, axis=axis, inner=None)
            if axis + 1 < len(new) and new[axis : axis + 2] == (heads, size):
                return dataclasses.replace(held, axis=axis, inner=axis + 1)
        return None
    behind = [math.prod(old[held.axis + 1 : end]) for end in range(held.axis + 1, len(old) + 1)]
    places = [axis for axis in range(len(new)) if math.prod(new[:axis]) == before]
    for axis in places:
        if new[axis] == size:
            return dataclasses.replace(held, axis=axis)
    for axis in places:
        if new[axis] // size in behind and new[axis] % size == 0:
            times = new[axis] // size
            parts = tuple(dataclasses.replace(part, columns=part.columns * times) for part in held.parts)
            return dataclasses.replace(held, axis=axis, parts=parts)
    for axis in places:
        if (
            held.single is not None
            and axis + 1 < len(new)
            and new[axis] * new[axis + 1] == size
            and new[axis] > 1
        ):
            return dataclasses.replace(held, axis=axis, inner=axis + 1)
    return None
