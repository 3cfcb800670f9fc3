"""ExecuTorch programs on numpy arrays: `open_program` opens one with what is installed, without PyTorch if it can."""

import ctypes
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from device_runtime.engines import executorch_library
from device_runtime.engines.engine import EngineError

MAX_RANK = 8
# ExecuTorch's ScalarType
_DTYPES: dict[int, np.dtype[Any]] = {
    number: np.dtype(name)
    for number, name in {
        0: "uint8",
        1: "int8",
        2: "int16",
        3: "int32",
        4: "int64",
        5: "float16",
        6: "float32",
        7: "float64",
        11: "bool",
    }.items()
}
_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}


class Program(Protocol):
    """A loaded .pte program. Not safe to share between threads."""

    def largest(self, method: str, index: int) -> tuple[int, ...]:
        """Returns the shape of input `index`, where it varies the largest one.

        Raises:
            EngineError: no such method or input.
        """
        ...

    def run(
        self, method: str, arrays: Sequence[NDArray[Any]], out: Sequence[NDArray[Any] | None] | None = None
    ) -> list[NDArray[Any]]:
        """Returns the outputs of `method`, arrays of the caller's own.

        arrays   contiguous, of the dtypes and shapes the method takes
        out      where outputs of fixed shape are to be written, C-contiguous; returned in their place

        Raises:
            EngineError: no such method, arrays it does not take, or a kernel that fails.
        """
        ...


def require() -> None:
    """Returns nothing if programs can be run here.

    Raises:
        EngineError: something is missing; the message names the command that helps.
    """
    _opener()


def open_program(program: bytes, data: bytes | None = None, *, threads: int = 1) -> Program:
    """Returns the .pte `program`, with the .ptd `data` it keeps its weights in, if any. Both may be let go afterwards.

    threads   of all programs in this process, from now on

    Raises:
        EngineError: not a program of this release, or nothing that runs it is installed.
    """
    return _opener()(program, data, threads)


def _opener() -> Callable[[bytes, bytes | None, int], Program]:
    try:
        path, libraries = executorch_library.find()
    except EngineError:
        if importlib.util.find_spec("torch") is None:
            raise
        executorch_library.wheel()  # if that is what is missing, PyTorch is no help
        from device_runtime.engines.executorch_official import OfficialProgram

        return OfficialProgram
    shim = executorch_library.load(path, libraries)
    return lambda program, data, threads: ShimProgram(shim, libraries, program, data, threads)


class _Array(ctypes.Structure):
    """An array as the shim sees it; `SpaflArray` there."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("dtype", ctypes.c_int32),
        ("rank", ctypes.c_int32),
        ("sizes", ctypes.c_int32 * MAX_RANK),
    )


@dataclass(frozen=True, slots=True)
class _Slot:
    """An input or output: its dtype, its largest shape, and whether the program has memory of its own for it."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    planned: bool


class ShimProgram:
    """A program run by ExecuTorch's own libraries through the shim, without PyTorch; see `Program`."""

    def __init__(
        self, shim: ctypes.CDLL, libraries: Path, program: bytes, data: bytes | None, threads: int
    ) -> None:
        self._shim, self._libraries = shim, libraries
        self._handle = ctypes.c_void_p()
        self._methods: dict[str, tuple[list[_Slot], list[_Slot]]] = {}
        shim.spafl_message.restype = ctypes.c_char_p
        shim.spafl_use_threads(threads)
        beside = (data, ctypes.c_uint64(len(data))) if data is not None else (None, ctypes.c_uint64(0))
        size = ctypes.c_uint64(len(program))
        self._check("open the program", shim.spafl_open(program, size, *beside, ctypes.byref(self._handle)))

    def largest(self, method: str, index: int) -> tuple[int, ...]:
        """Returns the largest shape of an input; see `Program`."""
        inputs, _ = self._loaded(method)
        if not 0 <= index < len(inputs):
            raise EngineError(f"{method} has {len(inputs)} inputs, no number {index}")
        return inputs[index].shape

    def run(
        self, method: str, arrays: Sequence[NDArray[Any]], out: Sequence[NDArray[Any] | None] | None = None
    ) -> list[NDArray[Any]]:
        """Returns the outputs of `method`; see `Program`."""
        inputs, outputs = self._loaded(method)
        if len(arrays) != len(inputs):
            raise EngineError(f"{method} takes {len(inputs)} arrays, got {len(arrays)}")
        if out is not None and len(out) != len(outputs):
            raise EngineError(f"{method} returns {len(outputs)} arrays, got room for {len(out)}")
        given = [
            _checked(method, i, value, slot)
            for i, (value, slot) in enumerate(zip(arrays, inputs, strict=True))
        ]
        held: list[NDArray[Any] | None] = []
        for i, slot in enumerate(outputs):
            place = out[i] if out is not None else None
            if place is not None:
                _refuse_place(method, i, place, slot)
            elif not slot.planned:
                place = np.empty(slot.shape, slot.dtype)
            held.append(place)
        sources = (_Array * len(given))(*map(_described, given))
        targets = (_Array * len(held))(*(_Array() if place is None else _described(place) for place in held))
        self._check(
            f"run {method}",
            self._shim.spafl_run(self._handle, method.encode(), len(given), sources, len(held), targets),
        )
        return [_result(target, place) for target, place in zip(targets, held, strict=True)]

    def _loaded(self, method: str) -> tuple[list[_Slot], list[_Slot]]:
        if method not in self._methods:
            name, backend = method.encode(), ctypes.c_char_p()
            for index in range(16):
                status = self._shim.spafl_backend(self._handle, name, index, ctypes.byref(backend))
                self._check(f"find {method}", status)
                if not backend.value:
                    break
                executorch_library.load_backend(backend.value.decode(), self._libraries)
            self._check(f"load {method}", self._shim.spafl_load(self._handle, name))
            counts = ctypes.c_int32(), ctypes.c_int32()
            self._check(
                f"load {method}", self._shim.spafl_count(self._handle, name, *map(ctypes.byref, counts))
            )
            inputs, outputs = (
                [self._slot(method, is_output, index) for index in range(count.value)]
                for is_output, count in enumerate(counts)
            )
            self._methods[method] = inputs, outputs
        return self._methods[method]

    def _slot(self, method: str, is_output: int, index: int) -> _Slot:
        array = _Array()
        status = self._shim.spafl_describe(
            self._handle, method.encode(), is_output, index, ctypes.byref(array)
        )
        self._check(f"load {method}", status)
        if array.dtype not in _DTYPES:
            raise EngineError(f"{method} uses ExecuTorch's type {array.dtype}, which has no numpy dtype")
        return _Slot(_DTYPES[array.dtype], tuple(array.sizes[: array.rank]), bool(array.data))

    def _check(self, doing: str, status: int) -> None:
        if status:
            why = self._shim.spafl_message().decode(errors="replace")
            raise EngineError(f"ExecuTorch cannot {doing} (error {status:#x}): {why[:300]}")

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle:
            self._shim.spafl_close(handle)
            self._handle = ctypes.c_void_p()


def _checked(method: str, index: int, value: NDArray[Any], slot: _Slot) -> NDArray[Any]:
    if value.dtype != slot.dtype or value.ndim != len(slot.shape):
        raise EngineError(
            f"{method} takes {slot.dtype} {slot.shape} as input {index}, got {value.dtype} {value.shape}"
        )
    if any(size > most for size, most in zip(value.shape, slot.shape, strict=True)):
        raise EngineError(f"{method} takes at most {slot.shape} as input {index}, got {value.shape}")
    return np.asarray(value, order="C")


def _refuse_place(method: str, index: int, place: NDArray[Any], slot: _Slot) -> None:
    if place.dtype != slot.dtype or place.shape != slot.shape or not place.flags.c_contiguous:
        raise EngineError(
            f"{method} returns contiguous {slot.dtype} {slot.shape} as output {index}, got room for {place.dtype} "
            f"{place.shape}"
        )


def _described(array: NDArray[Any]) -> _Array:
    sizes = (ctypes.c_int32 * MAX_RANK)(*array.shape)
    return _Array(array.ctypes.data, array.nbytes, _NUMBERS[array.dtype], array.ndim, sizes)


def _result(target: _Array, place: NDArray[Any] | None) -> NDArray[Any]:
    shape = tuple(target.sizes[: target.rank])
    if place is not None:
        return place if place.shape == shape else place.ravel()[: int(np.prod(shape))].reshape(shape).copy()
    dtype = _DTYPES[target.dtype]
    if target.bytes == 0:
        return np.empty(shape, dtype)
    # the program's own memory, good until its next run
    memory = (ctypes.c_char * target.bytes).from_address(target.data)
    return np.frombuffer(memory, dtype).reshape(shape).copy()
