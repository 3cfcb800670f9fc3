"""Figures are written as PNG of print size, whatever a run leaves out."""

import struct
from pathlib import Path

import numpy as np
import pytest

from trainer.figures import filters_figure, rounds_figure, thresholds_figure

DRAW = np.random.default_rng(0)


def size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">2I", data[16:24])


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("local_only", [None, 0.7])
def test_rounds(tmp_path: Path, rounds: int, local_only: float | None) -> None:
    density = {"conv1": [0.5] * rounds, "fc1": [1.0] * rounds}
    accuracy = [None, 0.5, 0.9][:rounds]
    path = rounds_figure(
        tmp_path / "new/rounds.png", range(1, rounds + 1), accuracy, density, local_only=local_only
    )
    assert size(path)[0] >= 1400  # 6.75 inches at 220 dots


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_thresholds(tmp_path: Path, layers: int) -> None:
    values = {f"fc{n}": DRAW.random((4, 5), np.float32) for n in range(layers)}
    assert size(thresholds_figure(tmp_path / "t.png", range(4), values))[0] >= 1400


@pytest.mark.parametrize("devices", [1, 8, 64])
def test_filters(tmp_path: Path, devices: int) -> None:
    active = DRAW.random((3, devices, 20)) < 0.5
    names = [f"{n:03}" for n in range(devices)]
    path = filters_figure(tmp_path / "f.png", "conv1", (1, 8, 15), active, names)
    before = path.read_bytes()
    filters_figure(path, "conv1", (1, 8, 15), ~active, names)
    assert path.read_bytes() != before
