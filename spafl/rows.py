"""Which filters stay when pruned ones are left out: those that are needed, in as many as their readers can take."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spafl import algorithm
from spafl.layout import Floats
from spafl.manifest import Compaction, Manifest

MULTIPLE = "multiple"
"""Initialiser of `infer.onnx`, int64 (1,): it keeps as many filters of a layer as this divides."""
WIDTH_BYTES = 5
"""Of a number in a graph's file that depends on how many channels stay (`Compaction.width_at`)."""


def staying(needed: NDArray[np.bool_], blocks: int = 1, multiple: int = 1) -> NDArray[np.int64]:
    """Returns the ascending indices (k,) of the channels that stay: the needed (channels,), and what fills them up.

    blocks    equally many stay in each of as many stretches of the channels, at least one
    multiple  as many as this divides, if there are enough
    """
    parts = needed.reshape(blocks, -1)
    count = max(1, int(parts.sum(1).max()))
    count = min(-(-count // multiple) * multiple, parts.shape[1])
    chosen = np.sort(np.argsort(~parts, axis=1, kind="stable")[:, :count], axis=1)
    return (chosen + np.arange(blocks)[:, None] * parts.shape[1]).reshape(-1)


def needed(entry: Compaction, active: Mapping[str, NDArray[np.bool_]]) -> NDArray[np.bool_]:
    """Returns which channels (out,) of a layer a compact model needs, given which filters are active, by layer."""
    found = np.zeros(entry.out, np.bool_)
    for together in entry.live:
        found |= np.logical_and.reduce([active[layer] for layer in together])
    return found


def kept_rows(
    compaction: Sequence[Compaction], active: Mapping[str, NDArray[np.bool_]], multiple: int = 1
) -> dict[str, NDArray[np.int64]]:
    """Returns which filters a compact model keeps, by layer, of those layers that leave any out."""
    return {
        entry.layer: staying(needed(entry, active), entry.blocks, multiple)
        for entry in compaction
        if entry.drops
    }


def kept_filters(
    compaction: Sequence[Compaction], active: Mapping[str, NDArray[np.bool_]], multiple: int = 1
) -> dict[str, int]:
    """Returns how many filters a compact model keeps, by layer, of those layers that leave any out."""
    return {layer: len(rows) for layer, rows in kept_rows(compaction, active, multiple).items()}


def training_rows(
    manifest: Manifest, active: Mapping[str, NDArray[np.bool_]]
) -> dict[str, NDArray[np.int64]]:
    """Returns the rows that a training step takes, by the layer they are named after.

    Layers whose channels are added up take the same ones: where a filter of any of them is active.
    """
    owners = {tensor.name: str(tensor.layer) for tensor in manifest.state if tensor.rows}
    blocks = {entry.layer: entry.blocks for entry in manifest.compaction}
    needed: dict[str, NDArray[np.bool_]] = {}
    for layer in manifest.layout.layers:
        if (owner := owners.get(layer.weight)) is not None:
            needed[owner] = needed[owner] | active[layer.name] if owner in needed else active[layer.name]
    return {owner: staying(rows, blocks.get(owner, 1)) for owner, rows in needed.items()}


def infer_graph(
    graph: bytes, manifest: Manifest, state: Mapping[str, Floats], multiple: int = 1
) -> tuple[bytes, dict[str, NDArray[Any]]]:
    """Returns `infer.onnx` made ready for a device's state, and the initialisers to supply it with.

    graph      the file as the bundle has it
    multiple   keep as many filters of a layer as this divides, where there are enough
    """
    supplied: dict[str, NDArray[Any]] = dict(state)
    if any(entry.drops for entry in manifest.compaction):
        supplied[MULTIPLE] = np.array([multiple], np.int64)
    places = {entry.layer: entry.width_at for entry in manifest.compaction if entry.width_at is not None}
    if not places:
        return graph, supplied
    mask = algorithm.mask_of(manifest.layout, state)
    kept, written = kept_rows(manifest.compaction, mask, multiple), bytearray(graph)
    for layer, at in places.items():
        written[at : at + WIDTH_BYTES] = width_bytes(len(kept[layer]))
    # the graph must not count otherwise, where a score is its threshold to the last bit
    return bytes(written), {**supplied, **algorithm.decided(manifest.layout, state, mask)}


def width_bytes(width: int) -> bytes:
    """Returns `width` as a varint of five bytes (protocol buffers' encoding): seven bits each, the lowest first.

    The usual writer leaves out leading zeros, every reader takes them: the length must not depend on the number.
    """
    last = WIDTH_BYTES - 1
    return bytes((width >> 7 * place) & 0x7F | (0x80 if place < last else 0) for place in range(WIDTH_BYTES))
