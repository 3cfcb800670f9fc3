"""The options of `spafl run create`: one per setting of a run, each with the protocol's own default."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

import typer

from spafl.errors import SettingsError
from spafl.hyperparameters import Hyperparameters
from spafl.protocol import Policy, RunSettings
from spafl.record import Record, RecordError


def _defaults(kind: type[Record]) -> dict[str, Any]:
    return {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]


def _option(kind: type[Record], field: str, help: str, unset: str) -> Any:
    default = _defaults(kind)[field]
    return typer.Option(help=help, show_default=unset if default is None else str(default))


def _run(field: str, help: str, unset: str = "") -> Any:
    return _option(RunSettings, field, help, unset)


def _training(field: str, help: str, unset: str = "") -> Any:
    return _option(Hyperparameters, field, help, unset)


def _condition(field: str, help: str, unset: str = "") -> Any:
    return _option(Policy, field, help, unset)


def _flag(field: str, help: str) -> Any:
    return typer.Option(f"--{field.replace('_', '-')}", help=help, show_default=False)


Rounds = Annotated[int | None, _run("rounds", "Aggregations until the run is finished.")]
Target = Annotated[int | None, _run("target", "Updates that close a round.")]
Minimum = Annotated[int | None, _run("minimum", "Updates a round needs at its deadline.", "half of target")]
OverSelection = Annotated[float | None, _run("over_selection", "Leases granted, as a multiple of target.")]
Deadline = Annotated[float | None, _run("deadline", "Seconds a round stays open.")]
LeaseSeconds = Annotated[float | None, _run("lease", "Seconds a device has to report.")]
Weighting = Annotated[
    Literal["examples", "plain"] | None, _run("weighting", "Mean weighted by example counts, or plain.")
]
Precision = Annotated[Literal["f32", "f16"] | None, _run("precision", "Of thresholds on the wire.")]

Epochs = Annotated[int | None, _training("epochs", "Passes over the local examples.")]
BatchSize = Annotated[int | None, _training("batch_size", "Examples per step.")]
Lr = Annotated[float | None, _training("lr", "Learning rate of the weights.")]
LrDecay = Annotated[float | None, _training("lr_decay", "Factor of the learning rates per round.")]
ThresholdLr = Annotated[float | None, _training("threshold_lr", "Learning rate of the thresholds.", "lr")]
Momentum = Annotated[float | None, _training("momentum", "Of SGD; starts at 0 each round.")]
Coeff = Annotated[float | None, _training("coeff", "Weight of the regulariser sum exp(-tau).")]
Ramp = Annotated[Literal["none", "fmnist"] | None, _training("ramp", "Schedule of coeff over the rounds.")]
Clip = Annotated[float | None, _training("clip", "Largest global gradient norm.", "no clipping")]

MinBattery = Annotated[
    float | None, _condition("min_battery_percent", "Battery charge in percent, at least.")
]
Charging = Annotated[bool | None, _flag("require_charging", "Only while charging.")]
Unmetered = Annotated[bool | None, _flag("require_unmetered", "Only on an unmetered network.")]
Idle = Annotated[bool | None, _flag("require_idle", "Only while nobody uses the device.")]
MaxTemperature = Annotated[
    float | None, _condition("max_temperature_celsius", "Degrees Celsius, at most.", "no limit")
]


def settings_of(given: Mapping[str, Any]) -> RunSettings:
    """Returns the settings in `given`, by field name; None is an option not given: the protocol's default holds.

    Raises:
        SettingsError: naming the first option that cannot be used, and why.
    """
    parts = {"hyperparameters": _of(Hyperparameters, given), "policy": _of(Policy, given)}
    try:
        return RunSettings.from_json({**_of(RunSettings, given), **parts})
    except RecordError as error:
        option = f"--{error.path[-1].replace('_', '-')}: " if error.path else ""
        raise SettingsError(f"{option}{error.problem}") from error


def _of(kind: type[Record], given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in _defaults(kind) if given.get(name) is not None}
