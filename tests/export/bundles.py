"""Bundles of test models: the build's manifest around graphs made once per session."""

from collections.abc import Iterable
from pathlib import Path

import onnx
import safetensors.numpy

from export.build import ROLES, _engine
from spafl.bundle import INITIAL_STATE, Bundle, write_bundle
from spafl.layout import Floats
from spafl.manifest import Manifest
from tests.export.models import Exported


def state_of(made: Exported) -> dict[str, Floats]:
    return {tensor.name: made.model.state_dict()[tensor.name].numpy().copy() for tensor in made.state}


def bundle_of(made: Exported, path: Path, roles: Iterable[str] = ROLES) -> Bundle:
    """The bundle of `made`, a directory, with the graphs of `roles` only: each takes seconds to trace."""
    files = {f"{role}.onnx": made.files[f"{role}.onnx"] for role in roles}
    manifest = Manifest(
        name="test",
        layout=made.layout,
        state=made.state,
        input=made.input,
        labels=made.labels,
        train_step=made.step,
        compaction=made.compaction,
        engines={"onnx": _engine({role: onnx.load_from_string(files[f"{role}.onnx"]) for role in roles})},
        files={name: {"bytes": 0, "sha256": "0" * 64} for name in files},
        producer={},
    )
    return write_bundle(path, manifest, {**files, INITIAL_STATE: safetensors.numpy.save(state_of(made))})
