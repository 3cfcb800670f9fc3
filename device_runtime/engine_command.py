"""`spafl device engines` and what an engine needs once: `build-executorch`, `install-ort-training`."""

from pathlib import Path
from typing import Annotated

import typer


def engines(
    names: Annotated[
        list[str] | None, typer.Argument(help="Engines to ask for; fails if one cannot run here.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False,
) -> None:
    """Tell which engines can run on this device, and what the others need."""
    from device_runtime.engines import ENGINES, EngineError, require_engine
    from device_runtime.report import print_facts

    found: dict[str, str] = {}
    for name in names or ENGINES:
        try:
            require_engine(name)
            found[name] = "ready"
        except EngineError as error:
            if names:
                raise
            found[name] = str(error)
    print_facts(found, json=json)


def build_executorch(
    out: Annotated[
        Path | None,
        typer.Option(
            help="Write the library and ExecuTorch's own to this folder; default: the user's cache."
        ),
    ] = None,
    package: Annotated[
        Path | None,
        typer.Option(help="An unpacked executorch wheel's executorch folder; default: the installed one."),
    ] = None,
    compiler: Annotated[
        str | None, typer.Option(help="C++ compiler and options; default: $CXX, c++ or g++.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False,
) -> None:
    """Build the small library through which the executorch engine runs without PyTorch.

    With --out the folder is all a device needs: copy it there and set SPAFL_EXECUTORCH to it.
    """
    from device_runtime.engines import executorch_library
    from device_runtime.report import print_facts

    source = executorch_library.wheel() if package is None else executorch_library.checked(package)
    path = executorch_library.build(source, out, compiler)
    print_facts({"library": str(path), "bytes": path.stat().st_size}, json=json)


def install_ort_training(
    out: Annotated[
        Path | None, typer.Option(help="Folder of the environment; default: in the user's cache.")
    ] = None,
    python: Annotated[
        Path | None, typer.Option(help="Python to make it with, 3.12 at most; default: this one.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")] = False,
) -> None:
    """Install ONNX Runtime Training in an environment of its own: it cannot share one with onnxruntime.

    With --out, set SPAFL_ORT_TRAINING to the Python that is printed.
    """
    from device_runtime.engines.ort_training_environment import install
    from device_runtime.report import print_facts

    made = install(out, python)
    size = sum(file.stat().st_size for file in made.parents[1].rglob("*") if file.is_file())
    print_facts({"python": str(made), "bytes": size}, json=json)
