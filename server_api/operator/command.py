"""`spafl run`: create, start, watch and steer runs on a server."""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from server_api.operator import creation as option
from server_api.operator import terminal
from server_api.operator.client import Action, OperatorClient
from server_api.operator.progress import Progress
from spafl.errors import SettingsError
from spafl.protocol import RunView
from spafl.record import Record
from spafl.secret import Secret

TOKEN_VARIABLE = "SPAFL_ADMIN_TOKEN"

app = typer.Typer(
    help="Create, start, watch and steer runs on a server. "
    f"The admin token comes from {TOKEN_VARIABLE} or --token-file.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="RUN", help="The run's name.")]
Server = Annotated[str, typer.Option(envvar="SPAFL_SERVER", help="The server's URL.")]
TokenFile = Annotated[
    Path | None, typer.Option(help=f"File that holds the admin token, instead of {TOKEN_VARIABLE}.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
LOCAL = "http://127.0.0.1:8000"


@app.command()
def bundle(
    file: Annotated[Path, typer.Argument(help="A bundle: .zip or directory.")],
    server: Server = LOCAL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Upload a bundle and print its id."""
    with _connected(server, token_file) as client:
        view = client.upload(file)
    typer.echo(view.to_text(indent=2) if as_json else view.id)


@app.command()
def create(
    name: Name,
    bundle: Annotated[
        str, typer.Option(help="A bundle to upload (.zip or directory), or the id of one that is there.")
    ],
    start: Annotated[bool, typer.Option("--start", help="Start the run at once.")] = False,
    rounds: option.Rounds = None,
    target: option.Target = None,
    minimum: option.Minimum = None,
    over_selection: option.OverSelection = None,
    deadline: option.Deadline = None,
    lease: option.LeaseSeconds = None,
    weighting: option.Weighting = None,
    precision: option.Precision = None,
    epochs: option.Epochs = None,
    batch_size: option.BatchSize = None,
    lr: option.Lr = None,
    lr_decay: option.LrDecay = None,
    threshold_lr: option.ThresholdLr = None,
    momentum: option.Momentum = None,
    coeff: option.Coeff = None,
    ramp: option.Ramp = None,
    clip: option.Clip = None,
    min_battery_percent: option.MinBattery = None,
    require_charging: option.Charging = None,
    require_unmetered: option.Unmetered = None,
    require_idle: option.Idle = None,
    max_temperature_celsius: option.MaxTemperature = None,
    server: Server = LOCAL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Create a run, uploading its bundle if a file is given; the same again changes nothing."""
    given = locals()  # every option by the name of the setting it sets
    with _connected(server, token_file) as client:
        if not _is_id(bundle):
            bundle = client.upload(Path(bundle)).id
        view = client.create(option.settings_of({**given, "bundle": bundle}))
        view = client.steer(name, "start") if start else view
    _print(view, as_json)


def _steering(action: Action, line: str) -> None:
    def steer(
        name: Name, server: Server = LOCAL, token_file: TokenFile = None, as_json: Json = False
    ) -> None:
        with _connected(server, token_file) as client:
            _print(client.steer(name, action), as_json)

    app.command(action, help=line)(steer)


_steering("start", "Start a created run: its first round opens.")
_steering("pause", "Pause a run: no new leases; the time of the open round stands still.")
_steering("resume", "Resume a paused run.")
_steering("stop", "Stop a run for good.")


@app.command()
def status(name: Name, server: Server = LOCAL, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Show a run and its open round."""
    with _connected(server, token_file) as client:
        view = client.run(name)
        open_round = None if view.round is None else client.round(name, view.round)
    if as_json:
        typer.echo(view.to_text(indent=2))
    else:
        terminal.console().print(terminal.run_card(view, open_round))


@app.command("list")
def list_runs(server: Server = LOCAL, token_file: TokenFile = None, as_json: Json = False) -> None:
    """List every run."""
    with _connected(server, token_file) as client:
        views = client.runs()
    if as_json:
        _print_lines(views)
    else:
        terminal.console().print(terminal.run_table(views))


@app.command()
def rounds(name: Name, server: Server = LOCAL, token_file: TokenFile = None, as_json: Json = False) -> None:
    """List a run's rounds, the oldest first."""
    with _connected(server, token_file) as client:
        views = client.rounds(name)
    if as_json:
        _print_lines(views)
    else:
        terminal.console().print(terminal.round_table(views))


@app.command()
def close(
    name: Name,
    round: Annotated[
        int | None, typer.Argument(help="The round; without it the open one.", show_default=False)
    ] = None,
    server: Server = LOCAL,
    token_file: TokenFile = None,
    as_json: Json = False,
) -> None:
    """Close a round now: aggregated if anyone reported, else failed."""
    with _connected(server, token_file) as client:
        if round is None:
            round = client.run(name).round
        if round is None:
            raise SettingsError(f"run {name} has no open round: see `spafl run status {name}`")
        view = client.close_round(name, round)
    if as_json:
        typer.echo(view.to_text(indent=2))
    else:
        terminal.console().print(terminal.round_table([view]))


@app.command()
def watch(name: Name, server: Server = LOCAL, token_file: TokenFile = None, as_json: Json = False) -> None:
    """Watch a run until it is over: live in a terminal, else a JSON line per event.

    The exit status is 0 if the run finished and 1 if it was stopped.
    """
    screen = terminal.console()
    with _connected(server, token_file) as client:
        progress, events = Progress.of(client.run(name)), client.events(name)
        if screen.is_terminal and not as_json:
            progress = terminal.show(screen, progress, events)
        else:
            for event in events:
                progress = progress.after(event)
                typer.echo(event.to_text())
    if progress.state != "finished":
        raise typer.Exit(1)


def _connected(server: str, token_file: Path | None) -> OperatorClient:
    return OperatorClient(server, _token(token_file))


def _token(file: Path | None) -> Secret:
    try:
        text = os.environ.get(TOKEN_VARIABLE, "") if file is None else file.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"cannot read the admin token from {file}: {type(error).__name__}") from None
    token = text.strip()
    if not token:
        raise SettingsError(
            f"no admin token: set {TOKEN_VARIABLE} or give --token-file; `spafl serve` prints it once"
        )
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise SettingsError("the admin token is not one line of printable ASCII")
    return Secret(token)


def _is_id(bundle: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", bundle) is not None


def _print(view: RunView, as_json: bool) -> None:
    if as_json:
        typer.echo(view.to_text(indent=2))
    else:
        terminal.console().print(terminal.run_table([view]))


def _print_lines(views: Iterable[Record]) -> None:
    for view in views:
        typer.echo(view.to_text())
