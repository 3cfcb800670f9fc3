"""Options that several commands of a device share."""

from pathlib import Path
from typing import Annotated

import typer

State = Annotated[Path, typer.Option(help="Directory with this device's state; one per device.")]
Data = Annotated[
    str,
    typer.Option(help=".npz, .csv, folder or .zip of class folders of images, or module:function."),
]
Threads = Annotated[int, typer.Option(min=1, max=64, help="Threads per operator.")]
Validation = Annotated[
    float,
    typer.Option(min=0, max=0.9, help="Share of the examples held out, where the data does not say which."),
]
Seed = Annotated[int, typer.Option(min=0, help="Of the split and of the order of the batches.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, one object per line.")]
