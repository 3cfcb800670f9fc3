"""Engines a device can train with; `open_engine` opens one by name."""

from device_runtime.engines.engine import Engine, EngineError, RoundStart, StepResult
from spafl.bundle import Bundle

ENGINES = {"onnx": "onnxruntime"}
"""Engine -> the package it needs."""


def open_engine(name: str, bundle: Bundle, *, threads: int = 1, spinning: bool = False) -> Engine:
    """Returns the engine `name` on `bundle`, with that many threads.

    Raises:
        EngineError: no such engine, its package is not installed, or the bundle has no files for it.
    """
    if name not in ENGINES:
        raise EngineError(f"no engine {name!r}: choose one of {', '.join(ENGINES)}")
    if name not in bundle.manifest.engines:
        raise EngineError(
            f"bundle {bundle.manifest.name} has files for {sorted(bundle.manifest.engines)}, not {name!r}"
        )
    try:
        from device_runtime.engines.onnx import OnnxEngine
    except ModuleNotFoundError as error:
        raise EngineError(f"engine {name!r} needs {ENGINES[name]}: pip install 'spafl[device]'") from error
    return OnnxEngine(bundle, threads=threads, spinning=spinning)


__all__ = ["ENGINES", "Engine", "EngineError", "RoundStart", "StepResult", "open_engine"]
