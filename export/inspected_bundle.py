"""A bundle in figures: what it trains, what it costs, and what compaction would keep of it and why."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from export.inspected_file import Facts, InspectError, read_bounded
from spafl.algorithm import mask_of
from spafl.bundle import Bundle, check_state
from spafl.layout import Floats
from spafl.manifest import Manifest
from spafl.proof import layer_costs, layer_proofs
from spafl.rows import kept_filters
from spafl.wire import Thresholds, encode_thresholds

JOURNAL = "journal.json"
MAX_JOURNAL_BYTES = 1 << 20
_BASE = "base"
"""In a device's state file beside the tensors: the global thresholds it has caught up to."""
_HEADER_BYTES = 1 << 20
_STATE_FILE = re.compile(r"state-[0-9]{1,18}\.safetensors")


def bundle_facts(path: Path, state: Path | None = None) -> Facts:
    """Returns what is to be known of the bundle at `path`, every byte of which is checked.

    state   a device's state directory, or the .safetensors of one: densities are its; None: the bundle's initial state

    Raises:
        BundleError: it is damaged or no bundle, or the state is of another model.
        InspectError: no state there.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    tensors = bundle.initial_state() if state is None else _state(state, bundle)
    mask = mask_of(manifest.layout, tensors)
    layers = _layers(manifest, mask)
    thresholds = Thresholds(manifest.layout.join(tensors), 0)
    parameters = _count(manifest, "weight", "parameter")
    return {
        "kind": "bundle",
        "path": str(path),
        "name": manifest.name,
        "id": bundle.id,
        "layout": manifest.layout.id,
        "input": manifest.input.to_json(),
        "labels": list(manifest.labels),
        "options": dict(manifest.options),
        "train_step": manifest.train_step.to_json(),
        "state": "initial" if state is None else str(state),
        "layers": layers,
        "density": {
            "mean_of_layers": float(np.mean([rows.mean() for rows in mask.values()])),
            "by_weights": _weighted(layers, "weights"),
            "by_flops": _weighted(layers, "flops"),
        },
        "totals": {
            "parameters": parameters,
            "thresholds": manifest.layout.size,
            "weights": sum(layer["weights"] for layer in layers),
            "flops": _sum(layers, "flops"),
            "kept_weights": sum(layer["kept_weights"] for layer in layers),
            "kept_flops": _sum(layers, "kept_flops"),
        },
        "wire": {
            "thresholds_f32": len(encode_thresholds(manifest.layout, thresholds)),
            "thresholds_f16": _f16_bytes(manifest),
            "weights_f32": 4 * parameters,
        },
        "engines": {
            name: {
                "files": {
                    role: {"name": file, "bytes": manifest.files[file].bytes}
                    for role, file in sorted(engine.files.items())
                },
                "requires": dict(engine.requires),
                "operators": {role: dict(counts) for role, counts in sorted(engine.operators.items())},
            }
            for name, engine in sorted(manifest.engines.items())
        },
        "files": {name: entry.bytes for name, entry in sorted(manifest.files.items())},
        "producer": dict(manifest.producer),
    }


def _layers(manifest: Manifest, mask: Mapping[str, NDArray[np.bool_]]) -> list[Facts]:
    """Returns the layers with weights, in the bundle's order; costs are those of a proof made of the same state."""
    masked = {layer.name: layer for layer in manifest.layout.layers}
    outs = {entry.layer: entry.out for entry in manifest.compaction}
    for entry in manifest.compaction:
        # the manifest's own checks do not hold these together
        live = {name for together in entry.live for name in together}
        if (
            any(name not in masked or masked[name].out != entry.out for name in live)
            or not all(entry.live)
            or not set(entry.reads) <= set(outs)
            or entry.out % entry.blocks
        ):
            raise InspectError(
                f"what the manifest says of compacting {entry.layer!r:.80} does not fit its layout: "
                "export the bundle again"
            )
    shapes = {tensor.name: tensor.shape for tensor in manifest.state}
    whole = layer_costs(manifest.compaction, {})
    left = layer_costs(manifest.compaction, kept_filters(manifest.compaction, mask))
    told = {proof.layer: proof for proof in layer_proofs(manifest.compaction, mask)}
    rows = []
    for entry in manifest.compaction:
        layer, shape = masked.get(entry.layer), shapes.get(f"{entry.layer}.weight", ())
        kind = layer.kind if layer else "conv" if len(shape) > 2 else "linear"
        rows.append(
            {
                "layer": entry.layer,
                "kind": kind,
                "filters": entry.out,
                "weights_per_filter": entry.n_in,
                "positions": entry.positions,
                "weights": whole[entry.layer][0],
                "flops": whole[entry.layer][1],
                "thresholds": layer.out if layer else 0,
                "density": float(mask[entry.layer].mean()) if layer else None,
                "kept": told[entry.layer].kept,
                "kept_weights": left[entry.layer][0],
                "kept_flops": left[entry.layer][1],
                "reads": entry.reads,
                "reason": told[entry.layer].reason,
            }
        )
    for name, layer in masked.items():
        if name not in whole:  # a bundle that says nothing of compaction, or not of this layer
            rows.append(
                {
                    "layer": name,
                    "kind": layer.kind,
                    "filters": layer.out,
                    "weights_per_filter": layer.n_in,
                    "positions": None,
                    "weights": layer.out * layer.n_in,
                    "flops": None,
                    "thresholds": layer.out,
                    "density": float(mask[name].mean()),
                    "kept": layer.out,
                    "kept_weights": layer.out * layer.n_in,
                    "kept_flops": None,
                    "reads": None,
                    "reason": "the bundle does not say what compaction does here",
                }
            )
    return rows


def _state(path: Path, bundle: Bundle) -> dict[str, Floats]:
    """Returns the state tensors a device keeps at `path`.

    Raises:
        InspectError: no state there, or it is damaged.
        BundleError: it is of another model.
    """
    manifest = bundle.manifest
    if path.is_dir():
        path = path / _named(path, bundle)
    # more than this it cannot have: the tensors, `base`, and a header
    limit = 4 * sum(math.prod(tensor.shape) for tensor in manifest.state) + 4 * manifest.layout.size
    try:
        tensors = safetensors.numpy.load(read_bounded(path, limit + _HEADER_BYTES))
    except (SafetensorError, KeyError) as error:  # KeyError: a dtype numpy does not have
        raise InspectError(
            f"{path} is not a safetensors file: {error}; expected a device's state directory, or its state file"
        ) from error
    tensors.pop(_BASE, None)
    check_state(manifest, tensors)
    return tensors


def _named(path: Path, bundle: Bundle) -> str:
    """Returns the state file that the journal of the device's directory at `path` names."""
    if not (path / JOURNAL).is_file():
        raise InspectError(f"{path} is not a device's state directory: it has no {JOURNAL}")
    try:
        journal = json.loads(read_bounded(path / JOURNAL, MAX_JOURNAL_BYTES))
    except (ValueError, RecursionError) as error:
        raise InspectError(f"{path / JOURNAL} is not JSON: {str(error)[:100]}") from error
    name: Any = journal.get("state") if isinstance(journal, dict) else None
    if name is None:
        raise InspectError(f"{path} holds no model yet: the device has not trained a round")
    if not (isinstance(name, str) and _STATE_FILE.fullmatch(name)):
        raise InspectError(f"{path / JOURNAL} names {name!r:.80} as its state: expected state-N.safetensors")
    if journal.get("bundle") != bundle.id:
        raise InspectError(
            f"{path} holds a model of bundle {journal.get('bundle')!r:.14}, not of {bundle.id[:12]}: give that "
            f"bundle, it is in {path / 'bundle'}"
        )
    return name


def _count(manifest: Manifest, *roles: str) -> int:
    return sum(math.prod(tensor.shape) for tensor in manifest.state if tensor.role in roles)


def _weighted(layers: list[Facts], cost: str) -> float | None:
    """Returns the masked layers' density, each layer counted by what it costs; None where one does not know."""
    masked = [layer for layer in layers if layer["density"] is not None]
    whole = _sum(masked, cost)
    return None if whole is None else sum(layer["density"] * layer[cost] for layer in masked) / whole


def _sum(layers: list[Facts], name: str) -> int | None:
    """Returns the sum over `layers`; None where one does not know."""
    values = [layer[name] for layer in layers]
    return None if None in values else sum(values)


def _f16_bytes(manifest: Manifest) -> int:
    # of zeros: a body's length does not depend on values, and some thresholds are too large for f16
    zeros = Thresholds(np.zeros(manifest.layout.size, np.float32), 0)
    return len(encode_thresholds(manifest.layout, zeros, "f16"))
