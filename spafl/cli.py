"""The `spafl` command: one entry, each room's commands loaded only when they are called."""

import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from spafl import __version__
from spafl.errors import SpaflError

COMMANDS = {
    "export": ("export.command", "Turn a PyTorch model into a bundle that devices train.", "export"),
    "inspect": (
        "export.inspect_command",
        "Show what a bundle, an ONNX model or an ExecuTorch program holds.",
        "export",
    ),
    "programs": ("export.program_command", "Make compact ExecuTorch programs from devices' masks.", "all"),
    "data": ("trainer.data.command", "Look at a dataset and split it over devices.", "trainer"),
    "serve": ("server_api.command", "Run the aggregation server.", "server"),
    "run": ("server_api.operator", "Create, start, watch and steer runs on a server.", "server"),
    "device": ("device_runtime.command", "Enrol, train, compact and predict on a device.", "device"),
    "demo": ("trainer.demo.command", "Server, devices and a report on this machine, in minutes.", "all"),
}
"""Command -> (module holding `app`, one line of help, the extra that brings what it needs)."""

_ROOMS = frozenset(module.partition(".")[0] for module, _, _ in COMMANDS.values()) | {"spafl"}


class LazyGroup(TyperGroup):
    """A command group that imports a command's module when that command is asked for, not before."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Returns the command names in the order of the straight line from model to device."""
        return list(COMMANDS)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Returns nothing; writes one line per command, from the table: six rooms would take seconds to import."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line, _) in COMMANDS.items()])

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Returns the command `cmd_name`, its module imported now; None if there is no such command.

        Raises:
            SpaflError: a package that the command needs is not installed.
        """
        if cmd_name not in COMMANDS:
            return None
        module, line, extra = COMMANDS[cmd_name]
        try:
            command = get_command(importlib.import_module(module).app)
        except ModuleNotFoundError as error:
            missing = (error.name or "").partition(".")[0]
            if missing in _ROOMS:
                raise
            raise SpaflError(
                f"`spafl {cmd_name}` needs {missing}, which is not installed: pip install 'spafl[{extra}]'"
            ) from error
        command.name, command.help = cmd_name, command.help or line
        return command


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
