"""Whether a device may train now: a policy, a reading, and the reasons against."""

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from spafl.protocol import Policy

SYS_CLASS = Path("/sys/class")
_POWERED = {
    "Charging": True,
    "Full": True,
    "Not charging": True,  # plugged in, and kept from 100 % to spare the battery
    "Discharging": False,
    "1": True,
    "2": True,
    "0": False,
}

Runner: TypeAlias = Callable[[Sequence[str]], str | None]
"""Runs a command and returns what it printed, None if it is missing or failed."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a device knows of itself now; None where it knows nothing, which counts as met."""

    battery_percent: float | None = None
    charging: bool | None = None
    unmetered: bool | None = None
    idle: bool | None = None
    temperature_celsius: float | None = None


def unmet(policy: Policy, reading: Reading) -> list[str]:
    """Returns the conditions of `policy` that `reading` does not meet, in words; empty if the device may train."""
    reasons = []
    battery, heat = reading.battery_percent, reading.temperature_celsius
    if battery is not None and battery < policy.min_battery_percent:
        reasons.append(f"battery at {battery:g} %, needs {policy.min_battery_percent:g} %")
    if policy.require_charging and reading.charging is False:
        reasons.append("not charging")
    if policy.require_unmetered and reading.unmetered is False:
        reasons.append("network is metered")
    if policy.require_idle and reading.idle is False:
        reasons.append("in use")
    if (
        heat is not None
        and policy.max_temperature_celsius is not None
        and heat > policy.max_temperature_celsius
    ):
        reasons.append(f"at {heat:g} °C, may have {policy.max_temperature_celsius:g} °C")
    return reasons


def read_conditions() -> Reading:
    """Returns this device's reading: from Termux:API on Android, else from Linux."""
    return read_termux() if shutil.which("termux-battery-status") else read_linux()


def run_command(command: Sequence[str]) -> str | None:
    """Returns what `command` printed within ten seconds, None if it is missing, failed or took longer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return done.stdout


def read_linux(root: Path = SYS_CLASS, run: Runner = run_command) -> Reading:
    """Returns the reading of a Linux device: power and heat from sysfs, the network and the user from systemd's bus.

    root   stands for /sys/class; kernel documentation: ABI/testing/sysfs-class-power, sysfs-class-thermal
    """
    # scope Device is the battery of a mouse or headset
    supplies = [
        supply for supply in sorted((root / "power_supply").glob("*")) if _text(supply / "scope") != "Device"
    ]
    batteries = [supply for supply in supplies if _text(supply / "type") == "Battery"]
    capacity = [value for supply in batteries if (value := _number(supply / "capacity")) is not None]
    powered = [_POWERED.get(_text(supply / "status")) for supply in batteries]
    powered += [_POWERED.get(_text(supply / "online")) for supply in supplies if supply not in batteries]
    known = [value for value in powered if value is not None]
    return Reading(
        battery_percent=min(capacity) if capacity else None,
        charging=any(known) if known else None,
        unmetered=_unmetered(run),
        idle=_idle(run),
        temperature_celsius=_temperature(root, batteries),
    )


def read_termux(run: Runner = run_command) -> Reading:
    """Returns the reading of an Android device through Termux:API; Wi-Fi counts as unmetered, idleness is unknown.

    Source: https://wiki.termux.com/wiki/Termux-battery-status
    """
    battery = _json(run(["termux-battery-status"]))
    wifi = _json(run(["termux-wifi-connectioninfo"]))
    plugged, connected = battery.get("plugged"), wifi.get("supplicant_state")
    return Reading(
        battery_percent=_finite(battery.get("percentage")),
        charging=plugged != "UNPLUGGED" if isinstance(plugged, str) else None,
        unmetered=connected == "COMPLETED" if isinstance(connected, str) else None,
        temperature_celsius=_finite(battery.get("temperature")),
    )


def _temperature(root: Path, batteries: list[Path]) -> float | None:
    # the battery is what heat harms and policies mean; its unit is a tenth of a degree, a thermal zone's a thousandth
    cells = [value / 10 for supply in batteries if (value := _number(supply / "temp")) is not None]
    zones = [
        value / 1000
        for zone in sorted((root / "thermal").glob("thermal_zone*"))
        if (value := _number(zone / "temp")) is not None
    ]
    # a zone without a sensor reports 0 or an absurd value
    believable = [celsius for celsius in cells or zones if 0 < celsius < 150]
    return max(believable) if believable else None


def _unmetered(run: Runner) -> bool | None:
    # NMMetered: 1 yes, 2 no, 3 guessed yes, 4 guessed no, 0 unknown
    # https://networkmanager.dev/docs/api/latest/nm-dbus-types.html#NMMetered
    name = "org.freedesktop.NetworkManager"
    answer = run(["busctl", "get-property", name, "/org/freedesktop/NetworkManager", name, "Metered"])
    return {"u 1": False, "u 3": False, "u 2": True, "u 4": True}.get((answer or "").strip())


def _idle(run: Runner) -> bool | None:
    name = "org.freedesktop.login1"
    answer = run(["busctl", "get-property", name, "/org/freedesktop/login1", f"{name}.Manager", "IdleHint"])
    return {"b true": True, "b false": False}.get((answer or "").strip())


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = json.loads(text or "")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _finite(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and abs(value) < 1e6 else None


def _number(file: Path) -> float | None:
    try:
        return _finite(float(_text(file)))
    except ValueError:
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
