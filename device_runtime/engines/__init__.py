"""Engines a device can train with; `open_engine` opens one by name.

onnx          stock onnxruntime; rows form, the smallest steps
executorch    ExecuTorch's own libraries, without torch
ort_training  ONNX Runtime Training 1.19, in a process and an environment of its own
"""

from collections.abc import Callable

from device_runtime.engines.engine import Engine, EngineError, RoundStart, StepResult
from spafl.bundle import Bundle

ENGINES = ("onnx", "executorch", "ort_training")


def require_engine(name: str) -> None:
    """Returns nothing if the engine `name` can run here: to be asked before any work is begun.

    Raises:
        EngineError: no such engine, or something it needs is not installed; the message names the command that helps.
    """
    _opener(name)


def open_engine(name: str, bundle: Bundle, *, threads: int = 1, spinning: bool = False) -> Engine:
    """Returns the engine `name` on `bundle`, with that many threads.

    spinning  threads wait busily where the engine can, which is faster alone and slower on busy cores

    Raises:
        EngineError: as `require_engine`, or the bundle has no files for it.
    """
    opener = _opener(name)
    if name not in bundle.manifest.engines:
        raise EngineError(
            f"bundle {bundle.manifest.name} has files for {', '.join(sorted(bundle.manifest.engines))}, not for "
            f"{name}: export it again with --engine {name}"
        )
    return opener(bundle, threads, spinning)


def _opener(name: str) -> Callable[[Bundle, int, bool], Engine]:
    # imported here: a device has the packages of its own engine only
    if name == "onnx":
        try:
            from device_runtime.engines.onnx import OnnxEngine
        except ModuleNotFoundError as error:
            raise EngineError(f"engine onnx needs {error.name}: pip install 'spafl[device]'") from error
        return lambda bundle, threads, spinning: OnnxEngine(bundle, threads=threads, spinning=spinning)
    if name == "executorch":
        from device_runtime.engines.executorch import ExecutorchEngine
        from device_runtime.engines.executorch_program import require

        require()
        return lambda bundle, threads, spinning: ExecutorchEngine(bundle, threads=threads)
    if name == "ort_training":
        from device_runtime.engines.ort_training import OrtTrainingEngine
        from device_runtime.engines.ort_training_environment import require_python

        require_python()
        return lambda bundle, threads, spinning: OrtTrainingEngine(bundle, threads=threads, spinning=spinning)
    raise EngineError(f"no engine {name!r}: choose one of {', '.join(ENGINES)}")


__all__ = ["ENGINES", "Engine", "EngineError", "RoundStart", "StepResult", "open_engine", "require_engine"]
