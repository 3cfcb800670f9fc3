"""The training step a device runs against PyTorch eager: dense and in rows form, at four densities.

All of them do the same work on the same batch: forward, backward, regulariser, momentum SGD on weights and
thresholds. The first run exports the models and keeps them; after that it takes under a minute.

    python benchmarks/train_step.py [--repeats 9] [--json] [--check]
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
from unittest.mock import patch

import numpy as np
import onnxruntime as ort
import torch
import typer
from bundles import bundle
from rich.console import Console
from rich.table import Table
from timing import medians

from device_runtime.engines import open_engine
from device_runtime.engines.onnx import options as plain_options
from spafl import algorithm
from spafl.bundle import Bundle
from spafl.hyperparameters import Hyperparameters
from trainer.local import sgd_step, zero_momenta
from trainer.models import MODELS
from trainer.sparsify import sparsify

BATCHES = {"lenet5": 64, "conv4": 16}
DENSITIES = (1.0, 0.5, 0.3, 0.1)
PROFILED = 10
"""Steps that onnxruntime takes its own time of."""
STILL = Hyperparameters(lr=1e-9, coeff=0.0)
"""Steps too small to move a mask, so that the density measured is the density asked for."""

FASTER = {"dense": 1.0, "rows 0.5": 3.0, "rows 0.3": 5.0, "rows 0.1": 10.0}
"""Bars: times faster than eager at one thread."""
KERNELS = {"Conv", "ConvTranspose", "MatMul", "FusedMatMul", "Gemm"}
MOST_OF_KERNELS = 1.75
"""Bar where the other is missed: the step, in the time of onnxruntime's own convolutions and matrix products in it.
No export makes those faster, and on some processors they alone take as long as PyTorch's whole step."""
MOST_RSS_MB, MOST_SECONDS = 110.0, 0.5
"""Bars of the device process that trains LeNet-5."""


@dataclass(frozen=True)
class Row:
    """Median milliseconds of a step by form, and how many times faster than eager each is.

    kernels  milliseconds of the convolutions and matrix products in it; at one thread only
    """

    model: str
    threads: int
    milliseconds: dict[str, float]
    faster: dict[str, float]
    kernels: dict[str, float]


def main(
    repeats: Annotated[int, typer.Option(min=3, help="Timed steps of each form.")] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a bar is missed.")] = False,
) -> None:
    """Time the training step of LeNet-5 and Conv4 in every form."""
    rows = [measure(model, threads, repeats) for model in BATCHES for threads in (1, 2)]
    processes = {model: device_process(model) for model in BATCHES}
    if as_json:
        print(json.dumps({"steps": [asdict(row) for row in rows], "processes": processes}, indent=2))
    else:
        show(rows, processes)
    missed, out_of_reach = missed_bars(rows, processes["lenet5"])
    if check:
        lines = [f"out of reach here: {line}" for line in out_of_reach] + [
            f"missed: {line}" for line in missed
        ]
        print("\n".join(lines), file=sys.stderr)
        raise typer.Exit(bool(missed))


def measure(model: str, threads: int, repeats: int) -> Row:
    """Returns the times of all forms of one model, taken in turns."""
    torch.set_num_threads(threads)
    whole, active = bundle(model, rows=False), bundle(model)
    draw = np.random.default_rng(0)
    size = BATCHES[model]
    x = draw.standard_normal((size, *active.manifest.input.shape), np.float32)
    y = draw.integers(0, len(active.manifest.labels), size)
    functions: dict[str, Callable[[], object]] = {"eager": eager_step(model, x, y)}
    functions["dense"] = engine_step(whole, 0.5, threads, x, y)
    for density in DENSITIES:
        functions[f"rows {density:g}"] = engine_step(active, density, threads, x, y)
    times = medians(functions, repeats)
    kernels = {}
    if threads == 1:
        kernels["dense"] = kernel_milliseconds(whole, 0.5, x, y)
        kernels |= {f"rows {density:g}": kernel_milliseconds(active, density, x, y) for density in DENSITIES}
    return Row(model, threads, times, {name: times["eager"] / time for name, time in times.items()}, kernels)


def eager_step(model: str, x: np.ndarray, y: np.ndarray) -> Callable[[], object]:
    """Returns one eager step; its cost does not depend on the density."""
    sparse = sparsify(MODELS[model]())
    momenta, images, labels = zero_momenta(sparse), torch.from_numpy(x), torch.from_numpy(y)
    return lambda: sgd_step(sparse, momenta, images, labels, STILL)


def engine_step(
    source: Bundle, density: float, threads: int, x: np.ndarray, y: np.ndarray
) -> Callable[[], object]:
    """Returns one step of the ONNX engine at `density`."""
    engine = open_engine("onnx", source, threads=threads, spinning=threads > 1)
    state = source.initial_state()
    thresholds = algorithm.thresholds_at(source.manifest.layout, state, density, np.random.default_rng(0))
    engine.begin_round(state, thresholds, thresholds)
    return lambda: engine.step(x, y, STILL)


def kernel_milliseconds(source: Bundle, density: float, x: np.ndarray, y: np.ndarray) -> float:
    """Returns the milliseconds of the convolutions and matrix products in a step, by onnxruntime's own profile."""
    with TemporaryDirectory(prefix="spafl-profile-") as folder:

        def profiled(threads: int, spinning: bool) -> ort.SessionOptions:
            options = plain_options(threads, spinning)
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(folder) / "profile")
            return options

        with patch("device_runtime.engines.onnx.options", profiled):
            step = engine_step(source, density, 1, x, y)
            for _ in range(PROFILED):
                step()
        del step  # the profile is written when its session goes
        events = [event for path in Path(folder).iterdir() for event in json.loads(path.read_text())]
    taken: dict[str, list[float]] = {}
    for event in events:
        if event.get("args", {}).get("op_name") in KERNELS and event["name"].endswith("_kernel_time"):
            taken.setdefault(event["name"], []).append(event["dur"] / 1e3)
    return sum(float(np.median(times)) for times in taken.values() if len(times) == PROFILED)


def device_process(model: str) -> dict[str, float]:
    """Returns the figures of a fresh process that trains `model`: the best of three starts, the largest memory."""
    script = Path(__file__).with_name("device_process.py")
    command = [sys.executable, str(script), str(bundle(model).path), str(BATCHES[model])]
    runs = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    if any(run["torch_loaded"] for run in runs):
        raise SystemExit("the device process loaded torch")
    return {
        "seconds_to_first_step": min(run["seconds_to_first_step"] for run in runs),
        "peak_rss_mb": max(run["peak_rss_mb"] for run in runs),
    }


def missed_bars(rows: list[Row], process: dict[str, float]) -> tuple[list[str], list[str]]:
    """Returns a line for each bar that is missed, and one for each that onnxruntime's kernels put out of reach."""
    missed, out_of_reach = [], []
    for row in (row for row in rows if row.threads == 1):
        for form, bar in FASTER.items():
            if row.faster[form] >= bar:
                continue
            line = (
                f"{row.model} {form}: {row.faster[form]:.2f} times eager's speed at one thread, bar {bar:g}"
            )
            whole, kernels = row.milliseconds[form], row.kernels[form]
            if whole <= MOST_OF_KERNELS * kernels:
                out_of_reach.append(f"{line}; {kernels:.1f} of its {whole:.1f} ms are onnxruntime's kernels")
            else:
                missed.append(line)
    if process["peak_rss_mb"] > MOST_RSS_MB:
        missed.append(f"peak RSS {process['peak_rss_mb']:.0f} MB, bar {MOST_RSS_MB:.0f}")
    if process["seconds_to_first_step"] > MOST_SECONDS:
        missed.append(f"import and load {process['seconds_to_first_step']:.2f} s, bar {MOST_SECONDS}")
    return missed, out_of_reach


def show(rows: list[Row], processes: dict[str, dict[str, float]]) -> None:
    """Returns nothing; prints the tables."""
    table = Table(title="ms per training step (times faster than PyTorch eager)", title_justify="left")
    for name in ("model", "threads", *rows[0].milliseconds):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        cells = [
            f"{time:.1f}" if name == "eager" else f"{time:.1f} ({row.faster[name]:.1f}x)"
            for name, time in row.milliseconds.items()
        ]
        table.add_row(f"{row.model} b{BATCHES[row.model]}", str(row.threads), *cells)
        if row.kernels:
            inside = [f"{row.kernels[name]:.1f}" if name in row.kernels else "" for name in row.milliseconds]
            table.add_row("  convolutions, products", "", *inside)
    console = Console(width=120)
    console.print(table)
    for model, figures in processes.items():
        console.print(
            f"device process training {model}: {figures['peak_rss_mb']:.0f} MB peak RSS, "
            f"{figures['seconds_to_first_step']:.2f} s from start to first step, no torch",
            highlight=False,
        )


if __name__ == "__main__":
    typer.run(main)
