"""What a demo leaves: a table on the terminal, results.json, three plots, and one HTML page that needs nothing else."""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainer.demo.meter import Kind
from trainer.demo.results import Device, Results
from trainer.demo.scenario import Trail
from trainer.figures import filters_figure, rounds_figure, thresholds_figure

Row = Sequence[str]

DEVICE_HEADINGS = ("device", "examples", "rounds", "before", "SpaFL", "alone", "density", "kB", "ms")
WIRE_HEADINGS = ("on the wire", "exchanges", "bodies", "with headers")


def write_report(results: Results, trail: Trail, out: Path) -> Path:
    """Returns the path of report.html, written to `out` beside results.json and the plots."""
    layers = tuple(results.layers)
    rounds = [entry.round for entry in results.rounds]
    density = {
        layer: [entry.density[number] for entry in results.rounds] for number, layer in enumerate(layers)
    }
    accuracy = [entry.accuracy for entry in results.rounds]
    versions = np.stack(trail.thresholds)
    ends = np.cumsum([0, *results.layers.values()])
    by_layer = {
        layer: versions[:, start:stop] for layer, start, stop in zip(layers, ends, ends[1:], strict=False)
    }
    plots = {
        "Accuracy and density by round": rounds_figure(
            out / "rounds.png", rounds, accuracy, density, local_only=results.accuracy("local_only")
        ),
        "Global thresholds by layer": thresholds_figure(
            out / "thresholds.png", range(len(versions)), by_layer
        ),
        "Active filters by device": filters_figure(
            out / "filters.png",
            trail.layer.name,
            list(trail.active),
            np.stack(list(trail.active.values())),
            [device.name.removeprefix("device-") for device in results.devices],
        ),
    }
    (out / "results.json").write_text(results.model_dump_json(indent=2) + "\n")
    page = out / "report.html"
    page.write_text(_page(results, plots), encoding="utf-8")
    return page


def summary(results: Results) -> RenderableType:
    """Returns the final tables for a terminal."""
    devices = _table(*_devices(results))
    devices.title = "accuracy on held-out examples; masked model → compact model"
    wire = _table(WIRE_HEADINGS, _wire_rows(results), None)
    return Group(devices, wire, Text(" ".join(_sentences(results))))


def _table(headings: Row, rows: Iterable[Row], last: Row | None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=0,  # the widest row then fits 80 columns
        pad_edge=False,
        title_justify="left",
        show_footer=last is not None,
    )
    for number, heading in enumerate(headings):
        table.add_column(
            heading, last[number] if last else "", justify="right" if number else "left", no_wrap=True
        )
    for row in rows:
        table.add_row(*row)
    return table


def _devices(results: Results) -> tuple[Row, list[Row], Row]:
    """Returns headings, a row for each device, and the row of all.

    Engines that are not all onnx take the place of examples and rounds: the widest row fits 80 columns.
    """
    engines = {device.engine for device in results.devices}
    headings, overall = list(DEVICE_HEADINGS), list(_overall_row(results))
    rows = [list(_device_row(device)) for device in results.devices]
    if engines != {"onnx"}:
        for line, cell in zip(
            (headings, *rows, overall),
            ("engine", *(device.engine for device in results.devices), str(len(engines))),
            strict=True,
        ):
            line[1:3] = [cell]
    return headings, [*rows], overall


def _device_row(device: Device) -> Row:
    masked, compact = device.proof.masked, device.proof.compact
    return (
        device.name.removeprefix("device-"),
        str(device.examples),
        str(device.rounds),
        f"{device.before:.1%}",
        f"{device.after:.1%}",
        f"{device.local_only:.1%}",
        f"{device.density:.1%}",
        f"{masked.bytes / 1e3:.0f} → {compact.bytes / 1e3:.0f}",
        f"{masked.latency_median_ms:.3f} → {compact.latency_median_ms:.3f}",
    )


def _overall_row(results: Results) -> Row:
    return (
        "all",
        str(sum(device.examples for device in results.devices)),
        str(sum(device.rounds for device in results.devices)),
        f"{results.accuracy('before'):.1%}",
        f"{results.accuracy('after'):.1%}",
        f"{results.accuracy('local_only'):.1%}",
        f"{results.density:.1%}",
        f"{results.ratio('bytes'):.1f}x less",
        f"{results.ratio('latency_median_ms'):.1f}x less",
    )


def _wire_rows(results: Results) -> list[Row]:
    names: dict[Kind, str] = {
        "thresholds": "thresholds, down and up",
        "coordination": "leases and the like",
        "bundle": "bundle, once per device",
    }
    rows: list[Row] = []
    for kind, name in names.items():
        counted = results.wire[kind]
        rows.append((name, str(counted.exchanges), _bytes(counted.body), _bytes(counted.total)))
    sends = str(2 * results.participations)
    return [*rows, ("FedAvg would send weights", sends, _bytes(results.fedavg_body), "")]


def _sentences(results: Results) -> list[str]:
    thresholds = results.wire["thresholds"]
    equal = sum(device.proof.equal for device in results.devices)
    worst = max(device.proof.relative_difference for device in results.devices)
    return [
        f"Thresholds took {_bytes(thresholds.body)} in {results.participations} participations, "
        f"{results.fedavg_body / thresholds.body:,.0f} times less than FedAvg of the same model.",
        f"{equal} of {len(results.devices)} compact models are proven equal to their masked ones "
        f"(largest relative difference {worst:.0e}).",
    ]


def _page(results: Results, plots: dict[str, Path]) -> str:
    template = Template((files(__package__) / "report.html").read_text(encoding="utf-8"))
    thresholds = results.wire["thresholds"]
    per_update = thresholds.body / max(1, thresholds.exchanges)
    cards = {
        f"{results.accuracy('after'):.1%}": f"accuracy on the devices' held-out examples; "
        f"{results.accuracy('local_only'):.1%} alone, {results.accuracy('before'):.1%} before",
        f"{results.density:.0%}": "of the filters active, mean over layers and devices; "
        f"{1 / results.ratio('weights'):.0%} of the weights are left",
        f"{results.ratio('bytes'):.1f}x": "smaller models on the devices, "
        f"{results.ratio('latency_median_ms'):.1f}x faster, equal outputs",
        f"{results.fedavg_body / thresholds.body:,.0f}x": "fewer bytes a round than FedAvg: "
        f"{_bytes(per_update)} instead of {_bytes(results.fedavg_body / (2 * results.participations))} each way",
    }
    settings = {
        "model": f"{results.model}, {results.weights:,} weights, {sum(results.layers.values())} thresholds",
        "data": f"{results.dataset}, Dirichlet {results.alpha:g} over {len(results.devices)} devices",
        "rounds": f"{len(results.rounds)} of {results.participations // len(results.rounds)} devices each",
        "seed": str(results.seed),
        **{name: str(value) for name, value in results.settings.items() if value is not None},
    }
    return template.substitute(
        title=escape(f"spafl demo: {results.model} on {Path(results.dataset).name}"),
        sentence=escape(
            f"{len(results.devices)} device processes trained {results.model} on their own examples and exchanged "
            f"{sum(results.layers.values())} thresholds a time with one server process; no weight left a device."
        ),
        cards="".join(
            f"<div class=card><b>{escape(value)}</b><span>{escape(text)}</span></div>"
            for value, text in cards.items()
        ),
        plots="".join(
            f'<figure><img alt="{escape(title)}" src="data:image/png;base64,'
            f'{base64.b64encode(path.read_bytes()).decode()}"></figure>'
            for title, path in plots.items()
        ),
        devices=_html_table(*_devices(results)),
        wire=_html_table(WIRE_HEADINGS, _wire_rows(results)),
        sentences=escape(" ".join(_sentences(results))),
        settings=_html_table(("setting", "value"), list(settings.items())),
        seconds=_html_table(
            ("stage", "seconds"), [(name, f"{value:.1f}") for name, value in results.seconds.items()]
        ),
    )


def _html_table(headings: Row, rows: Iterable[Row], last: Row | None = None) -> str:
    def line(cells: Row, tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "".join(line(row, "td") for row in rows)
    foot = f"<tfoot>{line(last, 'td')}</tfoot>" if last else ""
    return f"<div class=wide><table><thead>{line(headings, 'th')}</thead><tbody>{body}</tbody>{foot}</table></div>"


def _bytes(count: float) -> str:
    """Returns a number of bytes with three digits and a decimal unit."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1e3
    return f"{count:.3g} GB"
