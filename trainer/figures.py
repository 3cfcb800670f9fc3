"""Figures as PNG from plain arrays: no display, sizes for print, colours that survive colour blindness."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from spafl.layout import Floats

WIDTH = 6.75
"""Inches: the text width of most papers in one column."""
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""M. Okabe and K. Ito, "Color Universal Design" (2008), most distinct first."""
MARKERS = "os^Dv*P"
PRUNED = "#E4E7EB"
INK = "#22262B"
STYLE: dict[Any, Any] = {
    "figure.dpi": 220,
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.xmargin": 0.02,
    "grid.color": "#D0D4DA",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.titlesize": 10,
    "figure.titleweight": "bold",
    "lines.markersize": 3.5,
}


@rc_context(STYLE)
def rounds_figure(
    path: Path,
    rounds: Sequence[int],
    accuracy: Sequence[float | None],
    density: Mapping[str, Sequence[float]],
    *,
    local_only: float | None = None,
) -> Path:
    """Returns `path`, written: accuracy above, density by layer below, over the rounds.

    accuracy     (rounds,) share on the devices' held-out examples, None where no device had any
    density      layer -> (rounds,) share of active filters
    local_only   accuracy without exchange after the same number of local steps, drawn as a line
    """
    figure = Figure((WIDTH, 4.6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    share = np.array([np.nan if value is None else value for value in accuracy], float)
    above.plot(rounds, share, color=COLOURS[0], marker="o", label="SpaFL", clip_on=False)
    if local_only is not None:
        above.axhline(local_only, color=COLOURS[1], linestyle=(0, (5, 2)), label="local only, at the end")
        above.legend(loc="lower right")
    above.set(title="Accuracy on held-out examples, mean of the round's devices", ylabel="accuracy")
    lowest = np.nanmin([*share[~np.isnan(share)], local_only if local_only is not None else 1.0, 1.0])
    above.set_ylim(max(0.0, np.floor(lowest * 10 - 0.5) / 10), 1.0)
    for number, (layer, values) in enumerate(density.items()):
        below.plot(
            rounds,
            values,
            color=COLOURS[number % len(COLOURS)],
            marker=MARKERS[number % len(MARKERS)],
            linewidth=1.2,
            label=layer,
            clip_on=False,
        )
    if len(density) > 1:
        mean = np.mean(list(density.values()), axis=0)
        below.plot(rounds, mean, color=INK, linewidth=2.2, linestyle=(0, (1, 1)), label="mean of layers")
    below.set(title="Density: share of active filters", ylabel="density", xlabel="round", ylim=(0, 1.0))
    below.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    below.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (above, below):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.grid(True, axis="y")
    return _written(figure, path)


@rc_context(STYLE)
def thresholds_figure(
    path: Path, versions: Sequence[int], thresholds: Mapping[str, Floats], *, unit: str = "mean |weight|"
) -> Path:
    """Returns `path`, written: how each layer's global thresholds are distributed, version by version.

    thresholds   layer -> (versions, out)
    unit         what a threshold is compared with
    """
    columns = min(3, len(thresholds))
    rows = ceil(len(thresholds) / columns)
    figure = Figure((WIDTH, 0.4 + 2.1 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes, (layer, values) in zip(grid.flat, thresholds.items(), strict=False):
        lowest, low, middle, high, highest = np.quantile(values, (0, 0.25, 0.5, 0.75, 1), axis=1)
        axes.fill_between(versions, lowest, highest, color=COLOURS[0], alpha=0.18, linewidth=0, label="all")
        axes.fill_between(versions, low, high, color=COLOURS[0], alpha=0.45, linewidth=0, label="middle half")
        axes.plot(versions, middle, color=INK, linewidth=1.4, label="median")
        axes.set_title(f"{layer}, {values.shape[1]} filters")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5, min_n_ticks=1))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.grid(True, axis="y")
    for axes in grid.flat[len(thresholds) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("rounds aggregated")
    grid[0, 0].legend(loc="best")
    for axes in grid[:, 0]:
        axes.set_ylabel("threshold")
    figure.suptitle(f"Global thresholds by layer, on the scale of {unit}")
    return _written(figure, path)


@rc_context(STYLE)
def filters_figure(
    path: Path, layer: str, rounds: Sequence[int], active: NDArray[np.bool_], devices: Sequence[str]
) -> Path:
    """Returns `path`, written: which filters of `layer` are active on which device after each of `rounds`.

    active   (rounds, devices, filters)

    The view of Figure 3 of SpaFL (arXiv 2406.00431).
    """
    _, rows, filters = active.shape
    figure = Figure((WIDTH, 1.1 + len(rounds) * (0.55 + 0.17 * min(rows, 20))), layout="constrained")
    grid = figure.subplots(len(rounds), 1, sharex=True, squeeze=False)[:, 0]
    colours = ListedColormap([PRUNED, COLOURS[0]])
    for axes, round_, masks in zip(grid, rounds, active, strict=True):
        edges = np.arange(filters + 1) - 0.5, np.arange(rows + 1) - 0.5
        axes.pcolormesh(*edges, masks, cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=0.4)
        axes.invert_yaxis()
        axes.set_title(f"after round {round_}: {masks.mean():.0%} active")
        axes.set_ylabel("device")
        # every row gets its name while they can be read
        step = ceil(rows / 20)
        axes.set_yticks(range(0, rows, step), list(devices)[::step])
        share = axes.secondary_yaxis("right")
        share.set_yticks(range(0, rows, step), [f"{mask.mean():.0%}" for mask in masks][::step])
        for side in (axes, share):
            side.tick_params(length=0, labelsize=7)
            side.spines[:].set_visible(False)
    grid[-1].set_xlabel(f"filter of {layer}")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[-1].tick_params(axis="x", length=3)
    figure.suptitle(f"Active filters of {layer} by device")
    figure.legend(
        handles=[Patch(color=COLOURS[0], label="active"), Patch(color=PRUNED, label="pruned")],
        loc="outside lower center",
        ncols=2,
    )
    return _written(figure, path)


def _written(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path, metadata={"Software": "spafl"}, pil_kwargs={"optimize": True})  # type: ignore[no-untyped-call]
    return path
