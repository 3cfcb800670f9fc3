"""`spafl device build-executorch`: what the executorch engine needs once per machine."""

from pathlib import Path
from typing import Annotated

import typer


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
