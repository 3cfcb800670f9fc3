"""Compact models against whole ones, at four densities: time, FLOPs, file size, and how exactly they agree.

Compact is what `spafl device compact` writes; whole is the same with every filter active, or masked. The first run
exports the models and keeps them; after that it takes under a minute.

    python benchmarks/inference.py [--runs 300] [--json] [--check]
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from bundles import bundle
from rich.console import Console
from rich.table import Table
from timing import medians

from device_runtime.compaction import compact
from device_runtime.engines.onnx import options, session
from spafl import algorithm
from spafl.bundle import Bundle
from spafl.proof import RELATIVE_TOLERANCE, Proof

MODELS = ("lenet5", "conv4")
DENSITIES = (1.0, 0.5, 0.3, 0.1)
LANES = 16
"""Channels that onnxruntime's convolutions compute at a time (NCHWc blocks, AVX-512): 19 cost as much as 32."""

MOST_TIME_PER_FLOP = 1.5
"""Bar: time ratio over FLOP ratio, both to the whole model; the FLOPs counted in whole lanes."""


@dataclass(frozen=True)
class Row:
    """One compact model. Ratios are to the whole model, density 1; difference is to the masked model, relative.

    flop_ratio   of the multiplications there are; lane_ratio of those computed, channels rounded up to whole lanes
    """

    model: str
    density: float
    milliseconds: float
    kilobytes: float
    flops: int
    time_ratio: float
    flop_ratio: float
    lane_ratio: float
    difference: float
    agreement: float


def main(
    runs: Annotated[int, typer.Option(min=20, help="Timed runs of each model, batch 1, one thread.")] = 300,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a bar is missed.")] = False,
) -> None:
    """Time compact inference of LeNet-5 and Conv4."""
    rows = [row for model in MODELS for row in measure(bundle(model), runs)]
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=2))
    else:
        show(rows)
    missed = missed_bars(rows)
    if check and missed:
        print("\n".join(f"missed: {line}" for line in missed), file=sys.stderr)
        raise typer.Exit(1)


def measure(source: Bundle, runs: int) -> list[Row]:
    """Returns a row per density; the models take turns."""
    draw = np.random.default_rng(0)
    x = draw.standard_normal((64, *source.manifest.input.shape), np.float32)
    state = source.initial_state()
    proofs: dict[str, Proof] = {}
    sessions = {}
    with TemporaryDirectory(prefix="spafl-inference-") as folder:
        for density in DENSITIES:
            thresholds = algorithm.thresholds_at(source.manifest.layout, state, density, draw)
            state |= source.manifest.layout.split(thresholds)
            out = Path(folder) / f"{density:g}"
            proofs[f"{density:g}"] = compact(source, state, out, x, runs=20)
            sessions[f"{density:g}"] = session(str(out / "model.onnx"), options(1, spinning=False))
        feed = {"x": x[:1]}
        times = medians({name: lambda s=s: s.run(["logits"], feed) for name, s in sessions.items()}, runs)
    whole, whole_time = proofs["1"].compact, times["1"]
    return [
        Row(
            model=source.manifest.name,
            density=float(name),
            milliseconds=times[name],
            kilobytes=proof.compact.bytes / 1000,
            flops=proof.compact.flops,
            time_ratio=times[name] / whole_time,
            flop_ratio=proof.compact.flops / whole.flops,
            lane_ratio=lane_flops(source, proof) / lane_flops(source, proofs["1"]),
            difference=proof.relative_difference,
            agreement=proof.argmax_agreement,
        )
        for name, proof in proofs.items()
    ]


def lane_flops(source: Bundle, proof: Proof) -> float:
    """Returns the FLOPs of the compact model with the channels of convolutions rounded up to whole lanes."""
    kept = {layer.layer: layer.kept for layer in proof.layers}
    whole = {entry.layer: entry.out for entry in source.manifest.compaction}
    flops = 0.0
    for entry in source.manifest.compaction:
        block = LANES if entry.positions > 1 else 1
        columns: float = entry.n_in
        for layer in entry.reads:  # one at most in a chain
            columns *= -(-kept[layer] // block) / -(-whole[layer] // block)
        flops += 2 * entry.positions * columns * -(-kept[entry.layer] // block) * block
    return flops


def missed_bars(rows: list[Row]) -> list[str]:
    """Returns a line for each bar that is missed."""
    missed = []
    for row in rows:
        ratio = row.time_ratio / row.lane_ratio
        if ratio > MOST_TIME_PER_FLOP:
            missed.append(
                f"{row.model} at {row.density:g}: time ratio {row.time_ratio:.3f} is {ratio:.2f} times the "
                f"FLOP ratio in lanes {row.lane_ratio:.3f}, bar {MOST_TIME_PER_FLOP}"
            )
        if row.difference > RELATIVE_TOLERANCE:
            missed.append(f"{row.model} at {row.density:g}: differs by {row.difference:.1e}")
    return missed


def show(rows: list[Row]) -> None:
    """Returns nothing; prints the table."""
    table = Table(title="compact inference, batch 1, one thread; ratios to density 1", title_justify="left")
    names = (
        "model",
        "density",
        "ms",
        "kB",
        "MFLOP",
        "time ratio",
        "FLOP ratio",
        "in lanes",
        "difference",
        "same label",
    )
    for name in names:
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in rows:
        table.add_row(
            row.model,
            f"{row.density:g}",
            f"{row.milliseconds:.3f}",
            f"{row.kilobytes:,.0f}",
            f"{row.flops / 1e6:.2f}",
            f"{row.time_ratio:.3f}",
            f"{row.flop_ratio:.3f}",
            f"{row.lane_ratio:.3f}",
            f"{row.difference:.1e}",
            f"{row.agreement:.0%}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
