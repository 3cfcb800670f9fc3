"""What each engine costs a device: a training step, compact inference, memory, start, and megabytes installed.

Steps are of LeNet-5 at batch 64 on one thread, whole tensors; the onnx engine's rows form stands beside them. Compact
inference is at batch 1: onnx as `spafl device compact` writes it, executorch as an XNNPACK program. Engines take turns.
The first run exports the models and keeps them; after that it takes under a minute.

    python benchmarks/engines.py [--repeats 15] [--runs 300] [--json] [--check]
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import torch
import typer
from bundles import bundle
from parity import available
from rich.console import Console
from rich.table import Table
from timing import medians

from device_runtime.compaction import compact
from device_runtime.engines import open_engine
from device_runtime.engines.executorch_library import BACKENDS, LIBRARIES, build, wheel
from device_runtime.engines.onnx import options, session
from device_runtime.program import Program
from export.compact_program import whole_program
from spafl import algorithm
from spafl.bundle import Bundle
from spafl.hyperparameters import Hyperparameters
from spafl.ort_training import find_python
from trainer.models import LeNet5
from trainer.sparsify import sparsify

BATCH = 64
DENSITIES = (0.5, 0.3, 0.1)
DENSITY = 0.5
"""Of the training step, where it matters: to the rows form."""
STILL = Hyperparameters(lr=1e-9, coeff=0.0)
"""Steps too small to move a mask, so that the density measured is the density asked for."""

SLOWEST_STEP = 5.0
"""Bar: executorch's training step, in the onnx engine's, both on whole tensors."""
SLOWEST_INFERENCE = 1.5
"""Bar: compact XNNPACK inference, in the time of the compact ONNX model."""
MOST_RSS_MB = 60.0
"""Bar: a process that trains with executorch."""


@dataclass(frozen=True)
class Row:
    """One engine. ratio is of its step to the onnx engine's on whole tensors; None: it has no such thing.

    inference    milliseconds of the compact model by density
    rss_mb       peak of a process that trains, those it starts included
    installed_mb besides Python, numpy and this package
    """

    engine: str
    step_ms: float
    ratio: float
    inference_ms: dict[str, float] | None
    rss_mb: float
    seconds_to_first_step: float
    installed_mb: float


def main(
    repeats: Annotated[int, typer.Option(min=3, help="Timed training steps of each engine.")] = 15,
    runs: Annotated[int, typer.Option(min=20, help="Timed runs of each compact model.")] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a bar is missed.")] = False,
) -> None:
    """Measure every engine that can run here."""
    names = tuple(available())
    others = tuple(name for name in names if name != "onnx")
    whole, rows = bundle("lenet5", rows=False, engines=others), bundle("lenet5", engines=others)
    steps = training(whole, rows, names, repeats)
    inference = compact_inference(whole, names, runs)
    found = [row(name, whole, steps, inference) for name in names]
    if as_json:
        report = {"engines": [asdict(each) for each in found], "onnx_rows_step_ms": steps["onnx, rows"]}
        print(json.dumps(report, indent=2))
    else:
        show(found, steps["onnx, rows"])
    missed = missed_bars(found)
    if check and missed:
        print("\n".join(f"missed: {line}" for line in missed), file=sys.stderr)
        raise typer.Exit(1)


def training(whole: Bundle, rows: Bundle, names: tuple[str, ...], repeats: int) -> dict[str, float]:
    """Returns median milliseconds of a training step by engine, and of onnx in rows form, taken in turns."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((BATCH, *whole.manifest.input.shape), np.float32)
    y = draw.integers(0, len(whole.manifest.labels), BATCH)

    def step(source: Bundle, name: str) -> Callable[[], object]:
        engine, state = open_engine(name, source), source.initial_state()
        thresholds = algorithm.thresholds_at(source.manifest.layout, state, DENSITY, np.random.default_rng(0))
        engine.begin_round(state, thresholds, thresholds)
        return lambda: engine.step(x, y, STILL)

    functions = {name: step(whole, name) for name in names}
    return medians({**functions, "onnx, rows": step(rows, "onnx")}, repeats)


def compact_inference(source: Bundle, names: tuple[str, ...], runs: int) -> dict[str, dict[str, float]]:
    """Returns median milliseconds of the compact model by engine and density, batch 1, one thread, taken in turns."""
    draw, state = np.random.default_rng(0), source.initial_state()
    x = draw.standard_normal((64, *source.manifest.input.shape), np.float32)
    model = sparsify(LeNet5())
    functions: dict[str, Callable[[], object]] = {}
    with TemporaryDirectory(prefix="spafl-engines-") as folder:
        for density in DENSITIES:
            thresholds = algorithm.thresholds_at(source.manifest.layout, state, density, draw)
            state |= source.manifest.layout.split(thresholds)
            out = Path(folder) / f"{density:g}"
            compact(source, state, out, x, runs=20)
            graph = session(str(out / "model.onnx"), options(1, spinning=False))
            functions[f"onnx {density:g}"] = lambda graph=graph: graph.run(["logits"], {"x": x[:1]})
            if "executorch" in names:
                program = Program(whole_program(model, source.manifest, state), threads=1)
                functions[f"executorch {density:g}"] = lambda program=program: program.once(x[:1])
        times = medians(functions, runs)
    by_engine: dict[str, dict[str, float]] = {}
    for key, time in times.items():
        name, density_text = key.split()
        by_engine.setdefault(name, {})[density_text] = time
    return by_engine


def row(name: str, source: Bundle, steps: dict[str, float], inference: dict[str, dict[str, float]]) -> Row:
    """Returns the figures of one engine; those of its process from three fresh ones: least time, most memory."""
    script = Path(__file__).with_name("device_process.py")
    command = [sys.executable, str(script), str(source.path), str(BATCH), name]
    told = [
        json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    if any(run["torch_loaded"] for run in told):
        raise SystemExit(f"the device process loaded torch for {name}")
    return Row(
        engine=name,
        step_ms=steps[name],
        ratio=steps[name] / steps["onnx"],
        inference_ms=inference.get(name),
        rss_mb=max(run["peak_rss_mb"] for run in told),
        seconds_to_first_step=min(run["seconds_to_first_step"] for run in told),
        installed_mb=sum(map(size, installed(name))) / 1e6,
    )


def installed(name: str) -> list[Path]:
    """Returns the files and folders an engine needs on a device, besides numpy and this package."""
    if name == "onnx":
        spec = importlib.util.find_spec("onnxruntime")
        assert spec is not None
        assert spec.origin is not None
        return [Path(spec.origin).parent]
    if name == "executorch":
        # what `spafl device build-executorch --out` makes
        package = wheel()
        shim = build(package)
        return [shim, *(package / "lib" / library for library in (*LIBRARIES, *BACKENDS.values()))]
    code = "import onnxruntime; print(onnxruntime.__path__[0])"
    python = str(find_python())
    folder = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    return [Path(folder)]


def size(path: Path) -> int:
    """Returns the bytes of a file, or of all files in a folder."""
    if path.is_file():
        return path.stat().st_size
    return sum((Path(folder) / file).stat().st_size for folder, _, files in os.walk(path) for file in files)


def missed_bars(rows: list[Row]) -> list[str]:
    """Returns a line for each bar that is missed, or that could not be measured."""
    by_engine = {row.engine: row for row in rows}
    if "executorch" not in by_engine:
        return ["executorch cannot run here: `spafl device engines` tells why"]
    onnx, executorch = by_engine["onnx"], by_engine["executorch"]
    assert onnx.inference_ms is not None
    assert executorch.inference_ms is not None
    missed = []
    if executorch.ratio > SLOWEST_STEP:
        missed.append(
            f"executorch's step takes {executorch.ratio:.1f} times the onnx engine's, bar {SLOWEST_STEP:g}"
        )
    for density, time in executorch.inference_ms.items():
        ratio = time / onnx.inference_ms[density]
        if ratio > SLOWEST_INFERENCE:
            missed.append(
                f"compact XNNPACK inference at {density} takes {ratio:.2f} times ONNX's, bar {SLOWEST_INFERENCE:g}"
            )
    if executorch.rss_mb > MOST_RSS_MB:
        missed.append(f"executorch's process peaks at {executorch.rss_mb:.0f} MB, bar {MOST_RSS_MB:.0f}")
    return missed


def show(rows: list[Row], in_rows: float) -> None:
    """Returns nothing; prints the table."""
    table = Table(title=f"LeNet-5, batch {BATCH}, one thread", title_justify="left")
    table.add_column("engine")
    for heading in (
        "step ms",
        "of onnx",
        *(f"compact {d:g} ms" for d in DENSITIES),
        "RSS MB",
        "start s",
        "MB",
    ):
        table.add_column(heading, justify="right")
    for row in rows:
        inference = [f"{time:.3f}" for time in row.inference_ms.values()] if row.inference_ms else ["-"] * 3
        table.add_row(
            row.engine,
            f"{row.step_ms:.1f}",
            f"{row.ratio:.2f}x",
            *inference,
            f"{row.rss_mb:.0f}",
            f"{row.seconds_to_first_step:.2f}",
            f"{row.installed_mb:.0f}",
        )
    console = Console(width=110)
    console.print(table)
    console.print(f"onnx in rows form at density {DENSITY:g}: {in_rows:.1f} ms a step", highlight=False)
    console.print("RSS: peak while training. MB: installed, besides numpy and this package.", highlight=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    typer.run(main)
