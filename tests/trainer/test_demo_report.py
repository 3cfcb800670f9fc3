"""The demo's screen, tables and page, from made-up results: nothing missing, nothing from outside."""

import io
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from spafl.errors import SettingsError
from spafl.hyperparameters import Hyperparameters
from spafl.layout import ThresholdLayout
from spafl.protocol import Event
from trainer.demo.command import app
from trainer.demo.meter import Traffic
from trainer.demo.plan import Plan
from trainer.demo.report import summary, write_report
from trainer.demo.results import Results
from trainer.demo.scenario import Trail
from trainer.demo.screen import Screen

LAYOUT = ThresholdLayout.of(
    {"name": name, "kind": "linear", "out": out, "n_in": 9, "n_scale": 9, "offset": 0}
    for name, out in (("conv1", 4), ("fc1", 30))
)
DATASET = "<script>alert(1)</script>.zip"


def cost(scale: float) -> dict[str, float]:
    return {
        "bytes": int(1e6 * scale),
        "weights": int(2e5 * scale),
        "flops": int(4e6 * scale),
        "latency_median_ms": scale,
        "latency_p95_ms": 2 * scale,
    }


@pytest.fixture
def results() -> Results:
    proof = {
        "examples": 10,
        "relative_difference": 2e-7,
        "argmax_agreement": 1.0,
        "equal": True,
        "density": {"conv1": 1.0, "fc1": 0.5},
        "masked": cost(1.0),
        "compact": cost(0.25),
        "onnxruntime": "1.31.1",
    }
    devices = [
        {"name": f"device-{n:02}", "examples": 100 + n, "held_out": 10 * (n + 1), "rounds": 1, "steps": 5,
         "before": 0.1, "after": 0.9 + 0.1 * n, "local_only": 0.8, "proof": proof}
        for n in range(2)
    ]  # fmt: skip
    return Results.of(
        {"thresholds": Traffic(4, 800, 700, 1000, 900), "bundle": Traffic(), "coordination": Traffic()},
        model="lenet5",
        dataset=DATASET,
        alpha=0.5,
        seed=0,
        settings=Hyperparameters().to_json(),
        layers={"conv1": 4, "fc1": 30},
        weights=200_000,
        participations=2,
        rounds=[{"round": 1, "accuracy": 0.5, "density": (1.0, 0.5), "reported": 2}],
        devices=devices,
        fedavg_body=3_000_000,
        seconds={"export": 1.25},
    )


@pytest.fixture
def trail() -> Trail:
    return Trail(
        LAYOUT.layers[0],
        thresholds=[np.zeros(34, np.float32), np.ones(34, np.float32)],
        active={1: np.ones((2, 4), bool)},
    )


def test_overall_figures_weigh_devices_by_their_held_out_examples(results: Results) -> None:
    assert results.accuracy("after") == pytest.approx((10 * 0.9 + 20 * 1.0) / 30)
    assert results.ratio("bytes") == pytest.approx(4)
    assert results.density == pytest.approx(0.75)


class Page(HTMLParser):
    """Collects what a browser would fetch, and checks that tags are closed in order."""

    VOID = frozenset({"meta", "img", "link", "br", "hr", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_stands_alone(results: Results, trail: Trail, tmp_path: Path) -> None:
    text = write_report(results, trail, tmp_path).read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert len(page.fetched) == page.tags["img"] == 3
    assert all(source.startswith("data:image/png;base64,") for source in page.fetched)
    assert page.tags["script"] == 0
    assert not re.search(r"url\(|@import|https?://", text)
    assert not re.search(r"\$[a-z]", text)
    assert "prefers-color-scheme: dark" in text
    assert "width=device-width" in text
    assert Results.model_validate_json((tmp_path / "results.json").read_bytes()) == results
    assert {path.name for path in tmp_path.glob("*.png")} == {"rounds.png", "thresholds.png", "filters.png"}


def printed(results: Results) -> str:
    file = io.StringIO()
    Console(width=80, file=file).print(summary(results))
    return file.getvalue()


def test_a_mixed_fleet_shows_its_engines_and_fits_too(results: Results) -> None:
    assert "engine" not in printed(results)
    engines = ("onnx", "ort_training")
    devices = tuple(
        device.model_copy(update={"engine": engine})
        for device, engine in zip(results.devices, engines, strict=True)
    )
    text = printed(results.model_copy(update={"devices": devices}))
    assert "engine" in text
    assert "ort_training" in text
    assert "…" not in text


def test_the_tables_fit_eighty_columns(results: Results) -> None:
    text = printed(results)
    assert "…" not in text
    assert "1000 → 250" in text
    assert "2,000 times less than FedAvg" in text


def event(number: int, kind: str, **data: object) -> Event:
    return Event(id=number, time=0, run="demo", kind=kind, round=1, data=data)


@pytest.mark.parametrize("terminal", [True, False])
def test_the_screen_shows_what_it_is_told(terminal: bool) -> None:
    console = Console(width=100, height=40, file=io.StringIO(), force_terminal=terminal)
    with Screen(2, 2, console=console) as screen:
        with screen.stage("export"):
            screen.devices({"device-00": 52})
        for number, kind in enumerate(("round.opened", "lease.granted", "update.accepted")):
            screen.happened(event(number, kind))
        screen.heard("device-00", {"event": "epoch", "epoch": 2})
        screen.heard("device-00", {"event": "round.trained", "accuracy": 0.625, "density": [1.0, 0.5]})
        screen.heard("device-00", {"event": "something.new"})
        screen.happened(event(4, "round.aggregated", accuracy=0.75, density=[1.0, 0.5]))
    text = console.file.getvalue()
    assert "export" in text
    assert "75.0%" in text
    assert ("1 of 2, 1 leased" in text) == terminal
    assert ("62.5%" in text) == terminal


def plan(out: Path, **changes: object) -> Plan:
    fields = {
        "model": "lenet5", "dataset": "digits", "devices": 8, "rounds": 15, "per_round": 5, "alpha": 0.5,
        "seed": 0, "at_once": 2, "hyperparameters": Hyperparameters(),
    }  # fmt: skip
    return Plan(out=out, **fields | changes)


@given(devices=st.integers(1, 20), rounds=st.integers(1, 30), seed=st.integers(0, 99), data=st.data())
def test_cohorts_are_random_and_fair(devices: int, rounds: int, seed: int, data: st.DataObject) -> None:
    per_round = data.draw(st.integers(1, devices))
    asked = plan(Path(), devices=devices, rounds=rounds, per_round=per_round, seed=seed)
    cohorts = asked.cohorts()
    assert [len(set(cohort)) for cohort in cohorts] == [per_round] * rounds
    counts = Counter(device for cohort in cohorts for device in cohort)
    assert max(counts.values()) - min(counts[device] for device in range(devices)) <= 1
    assert cohorts == asked.cohorts()


def test_another_seed_gives_other_cohorts() -> None:
    assert plan(Path(), seed=0).cohorts() != plan(Path(), seed=1).cohorts()


def test_the_command_refuses_a_folder_with_something_else_in_it(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    result = CliRunner().invoke(app, ["--out", str(tmp_path)])
    assert isinstance(result.exception, SettingsError)
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize(
    "options", [["--per-round", "9"], ["--rounds", "1"], ["--lr", "-1"], ["--epochs", "5000"]]
)
def test_the_command_refuses_impossible_numbers(tmp_path: Path, options: list[str]) -> None:
    result = CliRunner().invoke(app, [*options, "--out", str(tmp_path / "new")])
    assert isinstance(result.exception, SettingsError)
    assert not (tmp_path / "new").exists()
