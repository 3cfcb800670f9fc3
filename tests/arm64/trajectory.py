"""A round of five steps on whatever machine runs this, with all it computed in one file; for the device's rooms only.

python trajectory.py ENGINE BUNDLE INPUTS OUT [BEGUN]

INPUTS  .npz: base and target (size,), x (5, batch, *shape), y (5, batch); the state is the bundle's initial one
OUT     .safetensors: density and collapsed (layers,), loss and correct (5,), checkpoint.* after three steps,
        ended.* after five, logits of the first batch; metadata: machine, and whether torch could be imported
BEGUN   such a file: the round goes on from its checkpoint instead of beginning
"""

import importlib.util
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from device_runtime.engines import open_engine
from spafl.bundle import Bundle
from spafl.hyperparameters import Hyperparameters

CUT = 3
HYPERPARAMETERS = Hyperparameters(lr=0.02, threshold_lr=0.005, coeff=0.01, clip=2.0)
CHECKPOINT, ENDED = "checkpoint.", "ended."


def main(name: str, path: str, inputs: str, out: str, begun: str | None = None) -> None:
    """Returns nothing; writes `out`."""
    bundle = Bundle.open(path)
    engine = open_engine(name, bundle)
    layers = [layer.name for layer in bundle.manifest.layout.layers]
    given = np.load(inputs)
    found = {}
    if begun is None:
        start = engine.begin_round(bundle.initial_state(), given["base"], given["target"])
        found["density"] = np.array([start.density[layer] for layer in layers])
        found["collapsed"] = np.array([layer in start.collapsed for layer in layers])
    else:
        taken = safetensors.numpy.load_file(begun)
        engine.resume(
            {
                key.removeprefix(CHECKPOINT): value
                for key, value in taken.items()
                if key.startswith(CHECKPOINT)
            }
        )
    steps = []
    for number in range(0 if begun is None else CUT, len(given["x"])):
        if number == CUT:
            found |= {CHECKPOINT + key: value for key, value in engine.checkpoint().items()}
        steps.append(engine.step(given["x"][number], given["y"][number], HYPERPARAMETERS))
    ended = engine.end_round()
    found |= {ENDED + key: value for key, value in ended.items()}
    found["loss"] = np.array([step.loss for step in steps])
    found["correct"] = np.array([step.correct for step in steps])
    found["logits"] = engine.predict(ended, given["x"][0])
    told = {"machine": platform.machine(), "torch": str(importlib.util.find_spec("torch") is not None)}
    safetensors.numpy.save_file(
        {key: np.ascontiguousarray(value) for key, value in found.items()}, Path(out), metadata=told
    )


def ended(trajectory: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Returns the state after the last step from what a trajectory's file holds."""
    return {name.removeprefix(ENDED): value for name, value in trajectory.items() if name.startswith(ENDED)}


if __name__ == "__main__":
    main(*sys.argv[1:])
