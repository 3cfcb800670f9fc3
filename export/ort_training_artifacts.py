"""Artifacts for ONNX Runtime Training: training, eval and optimizer model, and a checkpoint."""

import json
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from torch import nn

from export.decompositions import LoweringError
from export.ort_training_forward import OBJECTIVE, forward_model
from export.ort_training_models import eval_model, optimizer_model, training_model
from export.ort_training_trial import check_artifacts
from spafl.layout import ThresholdLayout
from spafl.manifest import EngineFiles, StateTensor
from spafl.ort_training import RELEASE, find_python
from spafl.step import MOMENTUM

FOLDER = "ort_training"
CHECKPOINT = "checkpoint"

_CANNOT = f"ONNX Runtime Training {RELEASE} cannot train this model"
_ADVICE = "Replace that operation, or leave --engine ort_training out"
_WORKER = Path(__file__).with_name("ort_training_gradient.py")
_SECONDS = 600
"""For the other environment to build and try what takes it a second or two."""


def ort_training_files(
    model: nn.Module, layout: ThresholdLayout, tensors: tuple[StateTensor, ...], shape: tuple[int, ...]
) -> tuple[dict[str, bytes], EngineFiles]:
    """Returns the artifacts by file name, and their entry in the manifest.

    Raises:
        LoweringError: an operation that ONNX Runtime Training has no gradient for, or a wrong one.
        SettingsError: ONNX Runtime Training is not installed.
    """
    python = find_python()
    forward = forward_model(model, tensors, shape)
    trained = [tensor.name for tensor in tensors if tensor.trained]
    with tempfile.TemporaryDirectory(prefix="spafl-") as name:
        folder = Path(name)
        (folder / "forward.onnx").write_bytes(forward.SerializeToString())
        (folder / "request.json").write_text(json.dumps({"trained": trained, "objective": OBJECTIVE}))
        (folder / "parameters.bin").write_bytes(b"".join(_with_lengths(_parameters(model, tensors))))
        _run(python, "gradient", folder)
        models = {
            "training_model": training_model(onnx.load(folder / "gradient.onnx"), tensors),
            "eval_model": eval_model(model, tensors, shape),
            "optimizer_model": optimizer_model(),
        }
        files = {f"{role}.onnx": made.SerializeToString(deterministic=True) for role, made in models.items()}
        for file, data in files.items():
            (folder / file).write_bytes(data)
        files[CHECKPOINT] = (folder / CHECKPOINT).read_bytes()
        check_artifacts(model, layout, tensors, shape, folder, lambda folder: _run(python, "trial", folder))
    operators = {role: Counter(node.op_type for node in made.graph.node) for role, made in models.items()}
    entry = EngineFiles(
        files={name.removesuffix(".onnx"): f"{FOLDER}/{name}" for name in files},
        requires={"onnxruntime-training": RELEASE},
        operators={role: dict(sorted(counts.items())) for role, counts in operators.items()},
    )
    return {f"{FOLDER}/{name}": data for name, data in files.items()}, entry


def _run(python: Path, what: str, folder: Path) -> None:
    """Returns nothing; `ort_training_gradient.py` did `what` in the other environment.

    Raises:
        LoweringError: it failed; the message holds the runtime's words.
    """
    command: list[str | Path] = [python, "-I", _WORKER, what, folder]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise LoweringError(f"{_CANNOT}: it took more than {_SECONDS} s. {_ADVICE}") from error
    if done.returncode < 0:
        raise LoweringError(f"{_CANNOT}: its process crashed ({-done.returncode}). {_ADVICE}")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no word why"])[-1]
        if found := re.search(r"gradient builder has not been registered: (\w+)", reason):
            reason = f"it has no gradient for {found[1]}"
        raise LoweringError(f"{_CANNOT}: {reason[:400]}. {_ADVICE}")


def _parameters(model: nn.Module, tensors: tuple[StateTensor, ...]) -> Iterator[bytes]:
    """Yields the parameters as TensorProtos: the model's state, and momenta of 0."""
    values = model.state_dict()
    for tensor in tensors:
        yield numpy_helper.from_array(values[tensor.name].numpy(), tensor.name).SerializeToString()
    for tensor in tensors:
        if tensor.trained:
            zeros = np.zeros(tensor.shape, np.float32)
            yield numpy_helper.from_array(zeros, MOMENTUM + tensor.name).SerializeToString()


def _with_lengths(parts: Iterator[bytes]) -> Iterator[bytes]:
    for part in parts:
        yield struct.pack("<Q", len(part)) + part
