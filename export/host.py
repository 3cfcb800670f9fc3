"""The plainest client of a bundle's graphs: begin -> step x N -> end, state in and out by name.

What the parity check trains with, and the shortest true description of what a client in any language does.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats
from spafl.manifest import Manifest
from spafl.step import ACTIVE, MOMENTUM, NEXT, ROWS

Arrays = dict[str, NDArray[Any]]


class GraphHost:
    """A device's state in a round, moved forward by the bundle's graphs; `files` are the graphs' bytes by name."""

    def __init__(self, manifest: Manifest, files: Mapping[str, bytes]) -> None:
        self.manifest = manifest
        self._begin = session(files["begin_round.onnx"])
        self._step = session(files["train_step.onnx"])
        self._end = session(files["end_round.onnx"])
        self.state: Arrays = {}
        self.momenta: Arrays = {}
        self.active: Arrays = {}
        self.rows: Arrays = {}

    def begin_round(self, state: Mapping[str, Floats], base: Floats, target: Floats) -> Arrays:
        """Returns begin_round's outputs; the state is caught up, its active rows gathered, momentum 0."""
        out = run(self._begin, {**state, "base": base, "target": target})
        self.state = {**state, **_strip(out, NEXT)}
        self.rows, self.active = _strip(out, ROWS), _strip(out, ACTIVE)
        trained = [tensor.name for tensor in self.manifest.state if tensor.trained]
        self.momenta = {name: np.zeros_like(self.rows.get(name, self.state[name])) for name in trained}
        return out

    def synchronise(self, state: Mapping[str, Floats], momenta: Mapping[str, Floats]) -> None:
        """Returns nothing; the round goes on from the given whole state and momenta, with the same active rows."""
        self.state, self.momenta = dict(state), dict(momenta)
        for tensor in self.manifest.state:
            if tensor.rows:
                index = self.active[str(tensor.layer)]
                self.rows[tensor.name] = state[tensor.name][index]
                if tensor.trained:
                    self.momenta[tensor.name] = momenta[tensor.name][index]

    def step(self, x: Floats, y: NDArray[np.int64], h: Hyperparameters) -> tuple[float, int]:
        """Returns mean task loss and right predictions of one step."""
        feeds: Arrays = {"x": x, "y": y}
        feeds |= {name: np.asarray(value, np.float32) for name, value in h.scalars().items()}
        feeds |= {f"{ACTIVE}{layer}": index for layer, index in self.active.items()}
        feeds |= self.state
        feeds |= {f"{ROWS}{name}": value for name, value in self.rows.items()}
        feeds |= {f"{MOMENTUM}{name}": value for name, value in self.momenta.items()}
        out = run(self._step, feeds)
        following = _strip(out, NEXT)
        self.momenta = _strip(following, MOMENTUM)
        self.rows = _strip(following, ROWS)
        self.state |= {name: value for name, value in following.items() if name in self.state}
        return float(out["loss"]), int(out["correct"])

    def end_round(self) -> Arrays:
        """Returns end_round's outputs; the trained rows are back in the state."""
        feeds = {
            **self.state,
            **{f"{ROWS}{name}": value for name, value in self.rows.items()},
            **{f"{ACTIVE}{layer}": index for layer, index in self.active.items()},
        }
        out = run(self._end, feeds)
        self.state |= _strip(out, NEXT)
        return out


def session(model: bytes, state: Mapping[str, Floats] | None = None) -> ort.InferenceSession:
    """Returns a one-thread CPU session; `state` supplies the external initialisers it names."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if state is not None:
        # never add_initializer: constant folding ignores it and keeps the old weights, without a word
        values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for value in state.values()]
        options.add_external_initializers(list(state), values)
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(graph: ort.InferenceSession, available: Mapping[str, Any]) -> Arrays:
    """Returns the outputs by name, fed with those of `available` that are inputs."""
    names = [output.name for output in graph.get_outputs()]
    feeds = {value.name: available[value.name] for value in graph.get_inputs()}
    return dict(zip(names, graph.run(names, feeds), strict=True))


def _strip(arrays: Mapping[str, NDArray[Any]], prefix: str) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
