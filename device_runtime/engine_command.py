"""`spafl device engines` and `build-executorch`: what a device can train with, and what an engine needs once."""

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
