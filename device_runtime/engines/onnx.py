"""The default engine: a stock onnxruntime runs the bundle's graphs; nothing else is needed but numpy."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from device_runtime.engines.checkpoint import refuse_foreign
from device_runtime.engines.engine import EngineError, RoundStart, StepResult
from spafl.bundle import Bundle
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats
from spafl.manifest import StateTensor
from spafl.rows import infer_graph
from spafl.step import ACTIVE, MOMENTUM, NEXT, ROWS, SCALARS

PREDICTION_BATCH = 256


def options(threads: int, spinning: bool) -> ort.SessionOptions:
    """Returns session options: `spinning` threads wait busily, which is faster alone and slower on busy cores."""
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.inter_op_num_threads = 1
    chosen.log_severity_level = 3
    chosen.enable_mem_pattern = False  # planning one block for all activations costs 17 MB and no time is won
    chosen.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    return chosen


def supply_state(chosen: ort.SessionOptions, state: Mapping[str, NDArray[Any]]) -> list[ort.OrtValue]:
    """Returns the values a session made with `chosen` will use as its external initialisers.

    Keep them as long as the session: it may read their memory without owning it. Not by add_initializer: constant
    folding ignores that and keeps the old weights, without a word.
    """
    values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value)) for value in state.values()]
    chosen.add_external_initializers(list(state), values)
    return values


def session(model: bytes | str, chosen: ort.SessionOptions) -> ort.InferenceSession:
    """Returns a CPU session of `model`.

    Raises:
        EngineError: onnxruntime refuses the graph.
    """
    try:
        return ort.InferenceSession(model, chosen, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's own errors share no base class
        raise EngineError(
            f"onnxruntime {ort.__version__} cannot load this graph: {str(error).splitlines()[0][:300]}"
        ) from error


def logits(graph: ort.InferenceSession, x: Floats) -> Floats:
    """Returns logits (n, labels) of an inference session for x (n, *shape), in batches that bound its memory."""
    starts = range(0, max(len(x), 1), PREDICTION_BATCH)
    return np.concatenate([graph.run(["logits"], {"x": x[at : at + PREDICTION_BATCH]})[0] for at in starts])


class OnnxEngine:
    """Trains with `train_step.onnx`; its state lives in two sets of buffers that take turns as input and output."""

    name = "onnx"

    def __init__(self, bundle: Bundle, *, threads: int = 1, spinning: bool = False) -> None:
        self.manifest = bundle.manifest
        self._bundle, self._threads, self._spinning = bundle, threads, spinning
        self._step_session: ort.InferenceSession | None = None
        self._round: _Round | None = None

    def begin_round(self, state: Mapping[str, Floats], base: Floats, target: Floats) -> RoundStart:
        """Returns what the round starts from; see `Engine`."""
        out = self._once("begin_round", {**state, "base": base, "target": target})
        caught_up = _under(NEXT, out)
        whole = {
            name: caught_up[name] if name in caught_up else value.copy() for name, value in state.items()
        }
        rows, active = _under(ROWS, out), _under(ACTIVE, out)
        momenta = {
            tensor.name: np.zeros_like(rows[tensor.name] if tensor.rows else whole[tensor.name])
            for tensor in self.manifest.state
            if tensor.trained
        }
        self._round = _Round(self._steps(), self.manifest.state, whole, rows, active, momenta)
        names = [layer.name for layer in self.manifest.layout.layers]
        density = dict(zip(names, out["density"].tolist(), strict=True))
        return RoundStart(
            density, tuple(name for name, hit in zip(names, out["collapsed"], strict=True) if hit)
        )

    def step(self, x: Floats, y: NDArray[np.int64], hyperparameters: Hyperparameters) -> StepResult:
        """Returns the outcome of one step; see `Engine`."""
        return self._current().step(x, y, hyperparameters)

    def checkpoint(self) -> dict[str, NDArray[Any]]:
        """Returns the round as it stands; see `Engine`."""
        current = self._current()
        momenta: dict[str, Floats] = {}
        for tensor in self.manifest.state:
            if tensor.trained:
                momenta[MOMENTUM + tensor.name] = np.zeros(tensor.shape, np.float32)
                current.put_back(tensor, momenta[MOMENTUM + tensor.name], current.momentum(tensor))
        active = {ACTIVE + layer: index for layer, index in current.active.items()}
        return {**self._whole(current), **momenta, **active}

    def resume(self, checkpoint: Mapping[str, NDArray[Any]]) -> None:
        """Returns nothing; the round goes on where `checkpoint` was taken; see `Engine`."""
        refuse_foreign(self.manifest, checkpoint)
        active = _under(ACTIVE, checkpoint)
        whole = {tensor.name: checkpoint[tensor.name].copy() for tensor in self.manifest.state}
        rows, momenta = {}, {}
        for tensor in self.manifest.state:
            if tensor.rows:
                rows[tensor.name] = whole[tensor.name][active[str(tensor.layer)]]
            if tensor.trained:
                momentum = checkpoint[MOMENTUM + tensor.name]
                momenta[tensor.name] = momentum[active[str(tensor.layer)]] if tensor.rows else momentum.copy()
        self._round = _Round(self._steps(), self.manifest.state, whole, rows, active, momenta)

    def end_round(self) -> dict[str, Floats]:
        """Returns the whole state after the round; see `Engine`.

        What `end_round.onnx` does too; here the rows are put back where they came from, without another copy.
        """
        current = self._current()
        self._round = None
        for tensor in self.manifest.state:
            current.put_back(tensor, current.whole[tensor.name], current.value(tensor))
        return current.whole

    def _whole(self, current: "_Round") -> dict[str, Floats]:
        whole = {name: value.copy() for name, value in current.whole.items()}
        for tensor in self.manifest.state:
            current.put_back(tensor, whole[tensor.name], current.value(tensor))
        return whole

    def predict(self, state: Mapping[str, Floats], x: Floats) -> Floats:
        """Returns logits (n, labels); see `Engine`."""
        chosen = options(self._threads, self._spinning)
        graph, supplied = infer_graph(self._file("infer"), self.manifest, state)
        held = supply_state(chosen, supplied)
        result = logits(session(graph, chosen), x)
        del held  # not before: the session reads it
        return result

    def _current(self) -> "_Round":
        if self._round is None:
            raise EngineError("no round is under way: call begin_round or resume first")
        return self._round

    def _steps(self) -> ort.InferenceSession:
        if self._step_session is None:
            self._step_session = session(self._file("train_step"), options(self._threads, self._spinning))
        return self._step_session

    def _once(self, role: str, available: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Returns the outputs of a graph that runs once a round: loading it again is cheaper than keeping it."""
        graph = session(self._file(role), options(self._threads, self._spinning))
        names = [output.name for output in graph.get_outputs()]
        feeds = {value.name: np.ascontiguousarray(available[value.name]) for value in graph.get_inputs()}
        return dict(zip(names, graph.run(names, feeds), strict=True))

    def _file(self, role: str) -> bytes:
        return self._bundle.read(self.manifest.engines[self.name].files[role])


class _Round:
    """The buffers of one round. `whole` is the state the rows were gathered from; `active` the row indices.

    `whole`, `rows` and `momenta` are written to; they must be the caller's to give away.
    """

    def __init__(
        self,
        graph: ort.InferenceSession,
        tensors: tuple[StateTensor, ...],
        whole: dict[str, Floats],
        rows: Mapping[str, Floats],
        active: Mapping[str, NDArray[np.int64]],
        momenta: Mapping[str, Floats],
    ) -> None:
        self.whole, self.active = whole, active
        self._graph = graph
        start: dict[str, Floats] = {}
        for tensor in tensors:
            start[tensor.step_name] = rows[tensor.name] if tensor.rows else whole[tensor.name].copy()
            if tensor.trained:
                start[MOMENTUM + tensor.name] = momenta[tensor.name]
        self._buffers = [
            {name: _buffer(value) for name, value in start.items()},
            {name: _buffer(np.empty_like(value)) for name, value in start.items()},
        ]
        self._loss, self._correct = _buffer(np.zeros((), np.float32)), _buffer(np.zeros((), np.int64))
        self._scalars = {name: _buffer(np.zeros((), np.float32)) for name in SCALARS}
        fixed = {ACTIVE + layer: _buffer(index) for layer, index in active.items()} | self._scalars
        self._bindings = [self._bind(fixed, *self._buffers), self._bind(fixed, *reversed(self._buffers))]
        self._turn = 0

    def step(self, x: Floats, y: NDArray[np.int64], h: Hyperparameters) -> StepResult:
        for name, value in h.scalars().items():
            self._scalars[name].update_inplace(np.asarray(value, np.float32))
        binding = self._bindings[self._turn]
        batch = (np.ascontiguousarray(x, np.float32), np.ascontiguousarray(y, np.int64))
        binding.bind_cpu_input("x", batch[0])
        binding.bind_cpu_input("y", batch[1])
        self._graph.run_with_iobinding(binding)
        self._turn ^= 1
        return StepResult(float(self._loss.numpy()), int(self._correct.numpy()))

    def value(self, tensor: StateTensor) -> Floats:
        """Returns the tensor's current value: its active rows where it has rows."""
        return self._buffers[self._turn][tensor.step_name].numpy()  # type: ignore[no-any-return]

    def momentum(self, tensor: StateTensor) -> Floats:
        """Returns the tensor's current momentum, of `value`'s shape."""
        return self._buffers[self._turn][MOMENTUM + tensor.name].numpy()  # type: ignore[no-any-return]

    def put_back(self, tensor: StateTensor, whole: Floats, value: Floats) -> None:
        """Writes `value` into `whole`, the whole tensor: as its active rows where the step holds only those."""
        whole[self.active[str(tensor.layer)] if tensor.rows else ...] = value

    def _bind(
        self, fixed: dict[str, ort.OrtValue], source: dict[str, ort.OrtValue], target: dict[str, ort.OrtValue]
    ) -> Any:
        binding = self._graph.io_binding()
        for name, value in {**fixed, **source}.items():
            binding.bind_ortvalue_input(name, value)
        for name, value in target.items():
            binding.bind_ortvalue_output(NEXT + name, value)
        binding.bind_ortvalue_output("loss", self._loss)
        binding.bind_ortvalue_output("correct", self._correct)
        return binding


def _buffer(value: NDArray[Any]) -> ort.OrtValue:
    # backed by the array itself, not by a copy, if it is C-contiguous
    return ort.OrtValue.ortvalue_from_numpy(np.asarray(value, order="C"))


def _under(prefix: str, arrays: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
