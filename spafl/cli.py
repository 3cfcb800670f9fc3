"""The `spafl` command: one entry, each room's commands loaded only when they are called."""

import importlib
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from spafl import __version__
from spafl.errors import SpaflError

COMMANDS = {
    "export": ("export.command", "Turn a PyTorch model into a bundle that devices train.", "export"),
    "data": ("trainer.data.command", "Look at a dataset and split it over devices.", "trainer"),
    "serve": ("server_api.command", "Run the aggregation server.", "server"),
    "run": ("server_api.operator", "Create, start, watch and steer runs on a server.", "server"),
    "device": ("device_runtime.command", "Enrol, train, compact and predict on a device.", "device"),
    "demo": ("trainer.demo.command", "Server, devices and a report on this machine, in minutes.", "all"),
}
"""Command -> (module holding `app`, one line of help, the extra that brings what it needs)."""

_FOREIGN = frozenset(
    {"torch", "onnx", "onnxscript", "onnxruntime", "fastapi", "uvicorn", "sqlalchemy", "matplotlib"}
)


class LazyGroup(TyperGroup):
    """A command group that imports a command's module when that command is asked for, not before."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Returns the command names in the order of the straight line from model to device."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Returns the command `cmd_name`, its module imported now; None if there is no such command."""
        if cmd_name not in COMMANDS:
            return None
        module, line, extra = COMMANDS[cmd_name]
        if (
            cmd_name not in sys.argv[1:]
        ):  # only listed in --help: importing six rooms for six lines would take seconds
            return get_command(_listed(line))
        try:
            command = get_command(importlib.import_module(module).app)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing not in _FOREIGN:
                raise
            raise SpaflError(
                f"`spafl {cmd_name}` needs {missing}, which is not installed: pip install 'spafl[{extra}]'"
            ) from error
        command.name = cmd_name
        return command


def _listed(line: str) -> typer.Typer:
    stub = typer.Typer(help=line)
    stub.command(help=line)(lambda: None)
    return stub


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"spafl {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Federated training that exchanges only thresholds; devices end with physically smaller models."""


def main() -> None:
    """Runs `spafl`; an error of ours is one line on stderr and exit status 2, never a traceback."""
    try:
        app()
    except SpaflError as error:
        typer.secho(f"spafl: {error}", fg=typer.colors.RED, err=True)
        raise SystemExit(2) from None
