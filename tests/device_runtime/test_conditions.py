import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from device_runtime.conditions import Reading, read_linux, read_termux, run_command, unmet
from spafl.protocol import Policy

STRICT = Policy(
    min_battery_percent=40,
    require_charging=True,
    require_unmetered=True,
    require_idle=True,
    max_temperature_celsius=40,
)


def no_command(command: Sequence[str]) -> str | None:
    return None


def supply(root: Path, name: str, **files: str) -> None:
    folder = root / "power_supply" / name
    folder.mkdir(parents=True)
    for file, text in files.items():
        (folder / file).write_text(text + "\n")


def zone(root: Path, name: str, millidegrees: str) -> None:
    (root / "thermal" / name).mkdir(parents=True)
    (root / "thermal" / name / "temp").write_text(millidegrees + "\n")


def test_no_reading_counts_as_met() -> None:
    assert unmet(STRICT, Reading()) == []


def test_every_condition_has_its_reason() -> None:
    reading = Reading(39.5, charging=False, unmetered=False, idle=False, temperature_celsius=40.5)
    assert unmet(STRICT, reading) == [
        "battery at 39.5 %, needs 40 %",
        "not charging",
        "network is metered",
        "in use",
        "at 40.5 °C, may have 40 °C",
    ]


def test_bounds_are_met_at_their_value() -> None:
    assert unmet(STRICT, Reading(40, True, True, True, 40)) == []


def test_a_laptop(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity="83", status="Discharging", temp="305")
    supply(tmp_path, "AC", type="Mains", online="0")
    assert read_linux(tmp_path, no_command) == Reading(83, False, None, None, 30.5)


def test_power_from_usb_counts_as_charging(tmp_path: Path) -> None:
    supply(tmp_path, "battery", type="Battery", capacity="50", status="Unknown")
    supply(tmp_path, "usb", type="USB", online="1")
    assert read_linux(tmp_path, no_command).charging is True


def test_a_battery_kept_below_full_is_plugged_in(tmp_path: Path) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity="80", status="Not charging")
    assert read_linux(tmp_path, no_command).charging is True


def test_a_mouse_is_not_the_device(tmp_path: Path) -> None:
    supply(tmp_path, "hidpp_battery_0", type="Battery", scope="Device", capacity="5", status="Discharging")
    assert read_linux(tmp_path, no_command) == Reading()


def test_a_board_without_battery_has_zones_only(tmp_path: Path) -> None:
    zone(tmp_path, "thermal_zone0", "47774")
    zone(tmp_path, "thermal_zone1", "51000")
    zone(tmp_path, "thermal_zone2", "-274000")
    zone(tmp_path, "thermal_zone3", "0")
    assert read_linux(tmp_path, no_command) == Reading(temperature_celsius=51)


@pytest.mark.parametrize("text", ["", "unknown", "nan", "1e400", "\0\0"])
def test_unreadable_values_are_no_reading(tmp_path: Path, text: str) -> None:
    supply(tmp_path, "BAT0", type="Battery", capacity=text, status=text, temp=text)
    zone(tmp_path, "thermal_zone0", text)
    assert read_linux(tmp_path, no_command) == Reading()


@pytest.mark.parametrize(
    ("metered", "unmetered"), [("u 1", False), ("u 3", False), ("u 2", True), ("u 4", True)]
)
def test_network_manager_knows_metered_networks(tmp_path: Path, metered: str, unmetered: bool) -> None:
    def run(command: Sequence[str]) -> str | None:
        return f"{metered}\n" if command[-1] == "Metered" else "b true\n"

    assert read_linux(tmp_path, run) == Reading(unmetered=unmetered, idle=True)


def test_termux() -> None:
    answers = {
        "termux-battery-status": json.dumps(
            {
                "health": "GOOD",
                "percentage": 77,
                "plugged": "UNPLUGGED",
                "status": "DISCHARGING",
                "temperature": 27.3,
            }
        ),
        "termux-wifi-connectioninfo": json.dumps({"supplicant_state": "COMPLETED", "rssi": -50}),
    }
    assert read_termux(lambda command: answers[command[0]]) == Reading(77, False, True, None, 27.3)


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '"x"', '{"percentage": "many", "plugged": 3}', '{"percentage": NaN}']
)
def test_termux_answers_that_say_nothing_are_no_reading(text: str | None) -> None:
    assert read_termux(lambda command: text) == Reading()


def test_a_command_that_is_missing_or_fails_says_nothing() -> None:
    assert run_command(["no-such-command-here"]) is None
    assert run_command(["false"]) is None
    assert run_command(["echo", "u 1"]) == "u 1\n"
