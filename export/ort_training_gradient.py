"""Runs in the environment of ONNX Runtime Training: builds gradients with its own builder, and tries what came of them.

python ort_training_gradient.py gradient|trial FOLDER

Imports the standard library, numpy and that onnxruntime, nothing of this project. Files in and out are in FOLDER.
"""

import json
import os
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


def gradient(folder: Path) -> None:
    """Returns nothing; writes gradient.onnx, forward.onnx with its backward pass, and checkpoint.

    request.json     trained: inputs to differentiate by; objective: the output to differentiate
    parameters.bin   TensorProtos for the checkpoint, each behind its length (8 bytes, little-endian)
    """
    from onnxruntime import SessionOptions
    from onnxruntime.capi import _pybind_state as runtime

    request: dict[str, Any] = json.loads((folder / "request.json").read_text())
    trained, objective = set(request["trained"]), request["objective"]
    options = SessionOptions()
    model = runtime.get_optimized_model((folder / "forward.onnx").read_bytes(), trained, options)
    builder = runtime.GradientGraphBuilder(model, {objective}, trained, objective, options)
    builder.build()
    (folder / "gradient.onnx").write_bytes(builder.get_model())
    parameters = list(_behind_lengths((folder / "parameters.bin").read_bytes()))
    runtime.save_checkpoint(parameters, [], str(folder / "checkpoint"), False)


def trial(folder: Path) -> None:
    """Returns nothing; writes after.npz: the parameters after one step of the artifacts, its loss and correct.

    before.npz   parameters (n,) float32, one after the other in the training model's order, x, y and the scalars
    """
    import onnxruntime

    # its __init__ imports torch; registered as a bare package, its parts can be imported without
    package = types.ModuleType("onnxruntime.training")
    package.__path__ = [os.path.join(os.path.dirname(onnxruntime.__file__), "training")]  # noqa: PTH118, PTH120
    sys.modules["onnxruntime.training"] = package
    from onnxruntime.training.api import CheckpointState, Module, Optimizer

    before = dict(np.load(folder / "before.npz"))
    state = CheckpointState.load_checkpoint(folder / "checkpoint")
    module = Module(folder / "training_model.onnx", state, folder / "eval_model.onnx")
    optimizer = Optimizer(folder / "optimizer_model.onnx", module)
    optimizer.set_learning_rate(1.0)
    buffer = onnxruntime.OrtValue.ortvalue_from_numpy(before["parameters"])
    module.copy_buffer_to_parameters(buffer._ortvalue, trainable_only=False)
    outcome = module.train()(*[before[name] for name in module.input_names()])
    after = dict(zip(module.output_names(), outcome, strict=True))
    optimizer.step()
    after["parameters"] = module.get_contiguous_parameters().numpy()
    np.savez(folder / "after.npz", **after)


def _behind_lengths(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        yield data[at + 8 : at + 8 + size]
        at += 8 + size


if __name__ == "__main__":
    try:
        {"gradient": gradient, "trial": trial}[sys.argv[1]](Path(sys.argv[2]))
    except Exception as error:  # the runtime's own errors share no base class
        # its messages begin with the place in its source and the signature there
        sys.exit(" ".join(str(error).rpartition("[ONNXRuntimeError] : ")[2].split()))
