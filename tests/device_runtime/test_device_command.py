import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from device_runtime.command import app
from device_runtime.errors import DataError, DeviceError, StateError, Unreachable
from device_runtime.report import JsonLines, Terminal
from device_runtime.state import DeviceState
from spafl.errors import SettingsError, SpaflError

NOWHERE = "http://127.0.0.1:9"  # the discard port: nothing listens


def device(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("data") / "d.npz"
    np.savez(file, x=random.integers(0, 256, (40, 8, 8), np.uint8), y=random.integers(0, 3, 40))
    return file


@pytest.fixture(scope="module")
def trained(small_bundle_file: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("trained") / "state"
    arguments = ("--bundle", small_bundle_file, "--state", state, "--data", data)
    events = lines(device("train", *arguments, "--rounds", 2, "--epochs", 1, "--batch-size", 8, "--json"))
    names = [event["event"] for event in events]
    assert names == ["round.begun", "epoch", "round.trained"] * 2 + ["finished"]
    return state


def test_training_again_trains_nothing_twice(trained: Path, small_bundle_file: Path, data: Path) -> None:
    arguments = ("--bundle", small_bundle_file, "--state", trained, "--data", data)
    assert [event["event"] for event in lines(device("train", *arguments, "--rounds", 2, "--json"))] == [
        "finished"
    ]


def test_status_tells_what_there_is_and_no_secret(trained: Path, tmp_path: Path) -> None:
    (facts,) = lines(device("status", "--state", trained, "--json"))
    assert (facts["run"], facts["phase"], facts["trained"]) == ("local", "idle", 2)
    assert set(facts["density"]) == {"0", "5"}
    (nothing,) = lines(device("status", "--state", tmp_path / "new", "--json"))
    assert nothing["device"] is None
    assert not (tmp_path / "new").exists()


def test_status_works_while_an_agent_holds_the_state(trained: Path) -> None:
    with DeviceState(trained):
        assert lines(device("status", "--state", trained, "--json"))[0]["trained"] == 2


def test_compacting_and_predicting(trained: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (proof,) = lines(device("compact", "--state", trained, "--data", data, "--out", out, "--json"))
    assert proof["equal"] is True
    assert Path(proof["model"]).is_file()
    model = out / "model.onnx"
    (measured,) = lines(device("predict", "--state", trained, "--model", model, data, "--json"))
    assert measured["examples"] == 40
    assert measured["accuracy"] == measured["right"] / 40
    Image.new("RGB", (20, 10), (200, 10, 10)).save(tmp_path / "a.png")
    images = lines(
        device(
            "predict", "--state", trained, "--model", model, tmp_path / "a.png", tmp_path / "a.png", "--json"
        )
    )
    assert [image["label"] in "abc" and 0 < image["probability"] <= 1 for image in images] == [True, True]


def test_what_is_printed_for_people_has_a_line_per_fact(trained: Path, data: Path, tmp_path: Path) -> None:
    text = device("compact", "--state", trained, "--data", data, "--out", tmp_path).stdout
    assert re.search(r"^argmax_agreement +1$", text, re.MULTILINE)
    assert re.search(r"^0 +\d+ => \d+ ", text, re.MULTILINE)  # layer 0: filters in all => filters kept


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (("run", "--run", "r", "--data", "d.npz"), StateError, "give --server and an enrolment key"),
        (("run", "--run", "r", "--data", "d.npz", "--server", NOWHERE), SettingsError, "no enrolment key"),
        (("enrol", "--server", "nonsense", "--key", "k"), SettingsError, "is not a URL"),
        (("enrol", "--server", NOWHERE, "--key", "k", "--name", "a b"), SettingsError, "--name"),
        (
            ("enrol", "--server", NOWHERE, "--key-file", "missing"),
            SettingsError,
            "cannot read the enrolment key",
        ),
        (("compact", "--data", "d.npz"), StateError, "holds no model yet"),
        (("predict", "d.npz"), StateError, "holds no model yet"),
        (("train", "--bundle", "missing.zip", "--data", "d.npz"), SpaflError, "no bundle at"),
        (("train", "--bundle", "b.zip", "--data", "d.npz", "--lr", "-1"), SettingsError, "--lr"),
        (("train", "--bundle", "b.zip", "--data", "d.npz", "--ramp", "up"), SettingsError, "--ramp"),
    ],
)
def test_mistakes_are_told_in_words(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    error: type[SpaflError],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SPAFL_ENROLMENT_KEY", raising=False)
    with pytest.raises(error, match=words):
        device(*arguments, "--state", tmp_path / "state")


def test_a_server_that_is_not_there_is_an_error_when_enrolling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("device_runtime.client.time.sleep", lambda seconds: None)
    monkeypatch.setenv("SPAFL_ENROLMENT_KEY", "key-in-the-environment")
    with pytest.raises(Unreachable, match="ConnectError") as caught:
        device("enrol", "--server", NOWHERE, "--state", tmp_path)
    assert "key-in-the-environment" not in str(caught.value)


def test_a_token_goes_to_its_own_server_only(tmp_path: Path, state: DeviceState) -> None:
    state.close()
    with pytest.raises(StateError, match="its token goes nowhere else"):
        device("run", "--state", state.path, "--run", "r", "--data", "d.npz", "--server", "http://other")


def test_images_and_sources_do_not_mix(trained: Path, data: Path) -> None:
    with pytest.raises(DataError, match="not all images"):
        device("predict", "--state", trained, data, "a.png")


def test_the_command_prints_one_line_and_exits_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from spafl.cli import main; main()",
            "device",
            "compact",
            "--data",
            "x",
            "--state",
            "no",
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("spafl: no holds no model yet")
    assert len(done.stderr.splitlines()) == 1


def test_json_lines_have_stable_keys() -> None:
    stream = io.StringIO()
    report = JsonLines(stream)
    report.event("epoch", round=1, loss=0.5, collapsed=())
    report.step("round 1", 1, 10, 0.5)
    (line,) = stream.getvalue().splitlines()
    event = json.loads(line)
    assert list(event) == ["time", "event", "round", "loss", "collapsed"]
    assert event["time"] > 1.6e9


def test_a_terminal_shows_events_and_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with Terminal() as report:
        report.event("round.trained", round=3, loss=0.123456, density=[0.5, 1.0], collapsed=(), accuracy=None)
        for done in range(1, 4):
            report.step("round 3, epoch 1 of 1", done, 3, 0.1)
    out = capsys.readouterr().out
    assert re.search(r"round\.trained +round 3 +loss 0\.1235 +density 0\.5 1", out)
    assert "None" not in out


def test_every_error_of_the_room_is_in_its_tree() -> None:
    from device_runtime import errors

    public = {n for n, e in vars(errors).items() if isinstance(e, type) and issubclass(e, DeviceError)}
    tree = str(errors.__doc__).split("\n\n")[1]
    drawn = re.findall(r"^[ │]*(?:[├└]── )?(\w+)", tree, re.MULTILINE)
    assert sorted(public) == sorted(drawn)
