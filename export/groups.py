"""Groups of channels while a model is walked through: who holds them, who reads them, why they stay."""

import dataclasses
from collections.abc import Sequence

from torch import fx

from export.channels import Channels, Group

AUDIBLE = "a pruned channel is not silent: its norm, bias or activation lets it speak"


class Groups:
    """The channels of values, by node of the graph, and what is done to their groups."""

    def __init__(self) -> None:
        self.channels: dict[fx.Node, Channels] = {}

    def hold(self, node: fx.Node, channels: Channels) -> None:
        """Returns nothing; the node's value holds these channels."""
        self.channels[node] = channels
        for group in channels.groups:
            group.values.append(node)

    def read(self, channels: Channels, reader: str) -> None:
        """Returns nothing; `reader` computes something else of these channels."""
        for group in channels.groups:
            group.readers.append(reader)
            if not (channels.zero and channels.cut):
                group.audible.setdefault(AUDIBLE)

    def stay(self, nodes: Sequence[fx.Node], reason: str) -> None:
        """Returns nothing; all channels of these values stay, for this reason."""
        for node in nodes:
            if node in self.channels:
                for group in self.channels[node].groups:
                    group.refusals.setdefault(reason)

    def in_blocks(self, group: Group, blocks: int) -> bool:
        """Returns whether equally many of a group's channels can stay in each block; from now on they do."""
        if group.blocks not in (1, blocks):
            group.refusals.setdefault(
                f"its channels are in {group.blocks} blocks for one reader, {blocks} for another"
            )
            return False
        group.blocks = blocks
        return True

    def only_read_by(self, group: Group, node: fx.Node) -> bool:
        """Returns whether nothing but `node`, and what passes on to it, takes the group's values."""
        inside = {*group.values, node}
        return all(user in inside or reads_shape(user) for value in group.values for user in value.users)

    def merge(self, group: Group, gone: Group) -> None:
        """Returns nothing; of two groups one is made: `gone`'s layers and values become `group`'s."""
        for node in gone.values:
            held = self.channels[node]
            parts = tuple(
                dataclasses.replace(part, group=group) if part.group is gone else part for part in held.parts
            )
            self.channels[node] = dataclasses.replace(held, parts=parts)
        group.layers += gone.layers
        group.others += gone.others
        group.norms |= gone.norms
        group.readers += gone.readers
        group.refusals |= gone.refusals
        group.audible |= gone.audible
        group.values += gone.values
        group.depthwise += gone.depthwise
        if gone.blocks > 1:
            self.in_blocks(group, gone.blocks)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Returns the shape of a node's value, with a batch of 2."""
    return tuple(node.meta["tensor_meta"].shape)


def tensors(node: fx.Node) -> list[fx.Node]:
    """Returns which of a node's first two arguments are tensors."""
    return [value for value in node.args[:2] if isinstance(value, fx.Node) and "tensor_meta" in value.meta]


def called(node: fx.Node) -> str:
    """Returns how to name an operation: a module by its path, a function by its node."""
    return str(node.target) if node.op == "call_module" else node.name


def reads_shape(node: fx.Node) -> bool:
    """Returns whether an operation asks for a value's sizes, not for the value."""
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim")
