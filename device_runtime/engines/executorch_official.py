"""ExecuTorch programs run by its own Python runtime, which imports PyTorch: where nobody built the shim."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.engines.engine import EngineError


class OfficialProgram:
    """A program of the official runtime; see `executorch_program.Program`. Ten times the memory, the same numbers."""

    def __init__(self, program: bytes, data: bytes | None, threads: int) -> None:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of being experimental
                # imported here: it brings PyTorch
                import torch
                from executorch.extension.pybindings import portable_lib
        except ImportError as error:
            raise EngineError(f"ExecuTorch's Python runtime does not load: {error}") from error
        self._torch = torch
        portable_lib._unsafe_reset_threadpool(threads)
        # held: the runtime reads them as long as it runs and keeps no reference, neither to the bytes nor to itself
        self._held = program, data
        self._methods: dict[str, Any] = {}
        try:
            self._module = portable_lib._load_for_executorch_from_buffer(
                program, *([data] if data is not None else [])
            )
        except RuntimeError as error:
            raise EngineError(f"ExecuTorch cannot open the program: {_first_line(error)}") from error

    def largest(self, method: str, index: int) -> tuple[int, ...]:
        """Returns the largest shape of an input; see `Program`."""
        meta = self._meta(method)
        if not 0 <= index < meta.num_inputs():
            raise EngineError(f"{method} has {meta.num_inputs()} inputs, no number {index}")
        return tuple(meta.input_tensor_meta(index).sizes())

    def run(
        self, method: str, arrays: Sequence[NDArray[Any]], out: Sequence[NDArray[Any] | None] | None = None
    ) -> list[NDArray[Any]]:
        """Returns the outputs of `method`; see `Program`."""
        meta = self._meta(method)
        if len(arrays) != meta.num_inputs():
            raise EngineError(f"{method} takes {meta.num_inputs()} arrays, got {len(arrays)}")
        for index, value in enumerate(arrays):
            shape = self.largest(method, index)
            if value.ndim != len(shape) or any(
                size > most for size, most in zip(value.shape, shape, strict=True)
            ):
                raise EngineError(f"{method} takes at most {shape} as input {index}, got {value.shape}")
        # from a copy where it is read-only: PyTorch warns of memory it might write to
        tensors = tuple(
            self._torch.from_numpy(np.require(value, requirements=["C", "W"])) for value in arrays
        )
        try:
            results = [tensor.numpy() for tensor in self._module.run_method(method, tensors)]
        except RuntimeError as error:
            raise EngineError(f"ExecuTorch cannot run {method}: {_first_line(error)}") from error
        for index, place in enumerate(out or ()):
            if place is not None:
                place[...] = results[index]
                results[index] = place
        return results

    def _meta(self, method: str) -> Any:
        if method not in self._methods:
            try:
                self._methods[method] = self._module.method_meta(method)
            except RuntimeError as error:
                raise EngineError(f"ExecuTorch cannot find {method}: {_first_line(error)}") from error
        return self._methods[method]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:300]
