"""Every model we know, compact against whole: time, FLOPs, file size, and how exactly both agree.

Weights are random, so a share of each layer's filters chosen at random is pruned: what sums keep, they keep for any
choice. Compact is what `spafl device compact --round-to auto` writes; whole is the same with every filter active.

    python benchmarks/compaction.py [--model NAME ...] [--runs 60] [--json] [--check]
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from bundles import inference_bundle
from rich.console import Console
from rich.table import Table
from timing import medians

from device_runtime.compaction import compact, fastest_multiple
from device_runtime.engines.onnx import options, session
from spafl import algorithm
from spafl.bundle import Bundle
from spafl.proof import RELATIVE_TOLERANCE, Proof
from trainer.models import MODELS

DENSITIES = (0.5, 0.3, 0.1)
WHOLE = 1.0
MOST_TIME_PER_FLOP = 2.0
"""Bar: time ratio over FLOP ratio, both to the whole model."""


@dataclass(frozen=True)
class Row:
    """One compact model. Ratios are to the whole one; difference is to the masked model, relative.

    kept       filters kept, of those there are
    multiple   what widths were rounded up to
    """

    model: str
    density: float
    kept: str
    multiple: int
    milliseconds: float
    kilobytes: float
    megaflops: float
    time_ratio: float
    flop_ratio: float
    size_ratio: float
    difference: float
    agreement: float


def main(
    model: Annotated[list[str] | None, typer.Option(help="Only these; default: all.")] = None,
    runs: Annotated[int, typer.Option(min=20, help="Timed runs of each, batch 1, one thread.")] = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a bar is missed.")] = False,
) -> None:
    """Time compact inference of every model."""
    with TemporaryDirectory(prefix="spafl-compaction-") as folder:
        rows = [
            row
            for name in model or MODELS
            for row in measure(inference_bundle(name, Path(folder)), Path(folder) / name, runs)
        ]
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show(rows)
    missed = list(missed_bars(rows))
    if check and missed:
        print("\n".join(f"missed: {line}" for line in missed), file=sys.stderr)
        raise typer.Exit(1)


def measure(source: Bundle, folder: Path, runs: int) -> list[Row]:
    """Returns a row per density; the models take turns."""
    draw = np.random.default_rng(0)
    x = example(source, draw)
    state = source.initial_state()
    proofs: dict[float, Proof] = {}
    functions: dict[str, Callable[[], object]] = {}
    for density in (WHOLE, *DENSITIES):
        thresholds = algorithm.thresholds_at(source.manifest.layout, state, density, draw)
        state |= source.manifest.layout.split(thresholds)
        multiple = fastest_multiple(source, state, x, runs=runs)
        out = folder / f"{density:g}"
        proofs[density] = compact(source, state, out, x, runs=20, multiple=multiple)
        graph = session(str(out / "model.onnx"), options(1, spinning=False))
        functions[str(density)] = lambda graph=graph: graph.run(["logits"], {"x": x[:1]})
    times, whole = medians(functions, runs), proofs[WHOLE].compact
    return [
        Row(
            model=source.manifest.name,
            density=density,
            kept=f"{sum(layer.kept for layer in proof.layers)}/{sum(layer.total for layer in proof.layers)}",
            multiple=proof.multiple,
            milliseconds=times[str(density)],
            kilobytes=proof.compact.bytes / 1000,
            megaflops=proof.compact.flops / 1e6,
            time_ratio=times[str(density)] / times[str(WHOLE)],
            flop_ratio=proof.compact.flops / whole.flops,
            size_ratio=proof.compact.bytes / whole.bytes,
            difference=proof.relative_difference,
            agreement=proof.argmax_agreement,
        )
        for density, proof in proofs.items()
    ]


def example(source: Bundle, draw: np.random.Generator) -> np.ndarray:
    """Returns 64 inputs: noise, or words where the model reads token ids."""
    shape = (64, *source.manifest.input.shape)
    if source.manifest.input.ids is not None:
        return draw.integers(0, source.manifest.input.ids, shape).astype(np.float32)
    return draw.standard_normal(shape, np.float32)


def missed_bars(rows: list[Row]) -> Iterator[str]:
    """Yields a line for each bar that is missed."""
    for row in rows:
        name = f"{row.model} at density {row.density:g}"
        if row.difference > RELATIVE_TOLERANCE or row.agreement < 1:
            yield f"{name} differs from the masked model by {row.difference:.1e}"
        if row.time_ratio > MOST_TIME_PER_FLOP * row.flop_ratio:
            yield (
                f"{name} takes {row.time_ratio:.2f} of the whole model's time for {row.flop_ratio:.2f} of its FLOPs, "
                f"bar {MOST_TIME_PER_FLOP:g} times as much"
            )


def show(rows: list[Row]) -> None:
    """Prints the rows as a table."""
    table = Table(title="compact models, batch 1, one thread")
    names = (
        "model",
        "density",
        "filters",
        "rounded to",
        "ms",
        "time",
        "MFLOPs",
        "FLOPs",
        "kB",
        "size",
        "difference",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        table.add_row(
            row.model,
            f"{row.density:g}",
            row.kept,
            str(row.multiple),
            f"{row.milliseconds:.3f}",
            f"{row.time_ratio:.2f}",
            f"{row.megaflops:.2f}",
            f"{row.flop_ratio:.2f}",
            f"{row.kilobytes:,.0f}",
            f"{row.size_ratio:.2f}",
            f"{row.difference:.0e}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
