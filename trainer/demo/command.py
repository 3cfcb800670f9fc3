"""`spafl demo`: one command from nothing to a report."""

import asyncio
import os
import shutil
import signal
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from spafl.errors import SettingsError
from spafl.hyperparameters import Hyperparameters
from spafl.record import RecordError
from trainer.demo.plan import HYPERPARAMETERS, Plan
from trainer.demo.report import summary, write_report
from trainer.demo.results import Results
from trainer.demo.scenario import Trail, play
from trainer.demo.screen import Screen
from trainer.models import MODELS

app = typer.Typer(rich_markup_mode=None)

Model = Enum("Model", {name: name for name in MODELS}, type=str)  # type: ignore[misc]

_MARK = ".spafl-demo"


@app.command()
def demo(
    devices: Annotated[int, typer.Option(min=1, max=999, help="Devices, each a process of its own.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds to aggregate.")] = 15,
    per_round: Annotated[
        int | None, typer.Option(min=1, help="Devices in a round; default: 5, or all.")
    ] = None,
    dataset: Annotated[
        str, typer.Option(help="digits, a folder, a .zip of class folders of images, or an .npz.")
    ] = "digits",
    model: Annotated[Model, typer.Option(help="What the devices train.")] = Model.lenet5,  # type: ignore[attr-defined]
    alpha: Annotated[
        float, typer.Option(help="Dirichlet parameter: the smaller, the fewer labels a device has.")
    ] = 0.5,
    limit: Annotated[
        int, typer.Option(min=0, help="Images of each label to use of class folders; 0 uses all.")
    ] = 500,
    epochs: Annotated[int | None, typer.Option(min=1, help="Local epochs a round.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    coeff: Annotated[
        float | None, typer.Option(help="Weight of the regulariser: how fast filters are pruned.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of the split, the weights, the cohorts and the batches.")
    ] = 0,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="What devices train with: onnx (default), executorch, ort_training; several take turns."
        ),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(min=1, help="Processes that work at the same time; default: one per core, at least 2."),
    ] = None,
    parity: Annotated[bool, typer.Option(help="Check the exported graphs against PyTorch.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for report, plots and results.")] = Path("demo"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as one JSON object.")] = False,
) -> None:
    """Run the whole line on this machine: split, export, serve, train on devices, compact, prove, report.

    Every part is a real process speaking HTTP. In the end: results.json, report.html and three PNG plots in --out, and
    below --out/work each device's state and compact model, and every process's log.
    """
    per_round = min(5, devices) if per_round is None else per_round
    if per_round > devices or rounds * per_round < devices:
        raise SettingsError(
            f"{rounds} rounds of {per_round} of {devices} devices: a round takes at most all of them, and each has to "
            "take part once"
        )
    plan = Plan(
        out=out,
        model=model.value,
        dataset=dataset,
        devices=devices,
        rounds=rounds,
        per_round=per_round,
        alpha=alpha,
        seed=seed,
        at_once=at_once or max(2, os.cpu_count() or 2),
        hyperparameters=_hyperparameters(model.value, epochs=epochs, lr=lr, coeff=coeff),
        limit=limit or None,
        parity=parity,
        engines=tuple(engine or ["onnx"]),
    )
    _make_room(plan)
    console = Console()
    with Screen(plan.rounds, plan.per_round) as screen:
        try:
            results, trail = asyncio.run(_until_signalled(plan, screen))
        except (KeyboardInterrupt, asyncio.CancelledError):
            screen.console.print(f"stopped; every process has ended, their logs are in {plan.work / 'logs'}")
            raise typer.Exit(130) from None
        with screen.stage("draw and write the report"):
            report = write_report(results, trail, plan.out)
    if as_json:
        typer.echo(results.model_dump_json())
    else:
        console.print(summary(results))
        console.print(f"report: {report}   results: {plan.out / 'results.json'}", highlight=False)


def _hyperparameters(model: str, **asked: Any) -> Hyperparameters:
    """Returns the model's hyperparameters with those asked for in their place."""
    given = {name: value for name, value in asked.items() if value is not None}
    try:
        return replace(HYPERPARAMETERS[model], **given)
    except RecordError as error:
        option = error.path[0]
        raise SettingsError(f"--{option} {given[option]}: {error.problem}") from error


async def _until_signalled(plan: Plan, screen: Screen) -> tuple[Results, Trail]:
    """Returns what `play` does; a signal that would end this process ends those it started first."""
    playing = asyncio.ensure_future(play(plan, screen))
    for number in (signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, playing.cancel)
    return await playing


def _make_room(plan: Plan) -> None:
    """Removes what an earlier demo left in the folder, and nothing else."""
    if (
        plan.out.exists()
        and not (plan.out / _MARK).exists()
        and (not plan.out.is_dir() or any(plan.out.iterdir()))
    ):
        raise SettingsError(f"{plan.out} exists and is no earlier demo's: give another --out")
    shutil.rmtree(plan.work, ignore_errors=True)
    plan.work.mkdir(parents=True)
    (plan.out / _MARK).touch()
