"""`spafl inspect`: what is in a bundle, an ONNX model or an ExecuTorch program, and what it costs.

Needs neither PyTorch nor a runtime: files are read, never run. A .onnx needs the package onnx.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from export.inspected_file import Facts, InspectError
from spafl.errors import SettingsError

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
WIDTH = 120
"""Columns of a table where nobody looks at it: reasons are longer than most terminals are wide."""
MOST = 400
"""Characters of one text in a table."""


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="A bundle (.zip or directory), a .onnx or a .pte.")],
    state: Annotated[
        Path | None,
        typer.Option(help="A device's state directory or state file: what its bundle has become there."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; docs/inspect.md names its keys.")
    ] = False,
) -> None:
    """Show what a bundle, an ONNX model or an ExecuTorch program holds: layers, sizes, FLOPs, what it needs.

    Of a bundle also what compaction would keep of each layer and why, in its initial state or in a device's. Files are
    read and never run.
    """
    facts = inspected(file, state)
    if as_json:
        typer.echo(json.dumps(facts))
    else:
        {"bundle": _show_bundle, "onnx": _show_graph, "executorch": _show_program}[facts["kind"]](facts)


def inspected(file: Path, state: Path | None = None) -> Facts:
    """Returns what is to be known of `file`; which kind it is follows from its name.

    state   of a device, for a bundle

    Raises:
        InspectError: there is no such file, or it is not what its name says.
        BundleError: it is a damaged bundle, or `state` is of another model.
        SettingsError: `state` is given for something else than a bundle.
    """
    suffix = file.suffix.lower()
    if file.is_dir() and not (file / "manifest.json").is_file():
        if (file / "bundle" / "manifest.json").is_file():
            raise InspectError(
                f"{file} is a device's state: spafl inspect {file / 'bundle'} --state {file} shows its model"
            )
        raise InspectError(
            f"{file} is not a bundle: it has no manifest.json. Give a bundle, a .onnx or a .pte"
        )
    if not file.exists():
        raise InspectError(f"no file at {file}: give a bundle, a .onnx or a .pte")
    if file.is_dir() or suffix == ".zip":
        from export.inspected_bundle import bundle_facts

        return bundle_facts(file, state)
    if state is not None:
        raise SettingsError(
            f"--state goes with a bundle, and {file} is none: leave it out, or give the bundle"
        )
    if suffix == ".onnx":
        try:
            from export.inspected_graph import graph_facts
        except ModuleNotFoundError as error:
            raise InspectError(
                f"reading a .onnx needs {error.name}, which is not installed: pip install onnx"
            ) from error

        return graph_facts(file)
    if suffix == ".pte":
        from export.inspected_program import program_facts

        return program_facts(file)
    raise InspectError(f"cannot tell what {file} is by its name: expected a bundle (.zip), a .onnx or a .pte")


def _show_bundle(facts: Facts) -> None:
    totals, wire, step, density = facts["totals"], facts["wire"], facts["train_step"], facts["density"]
    state = "its initial state" if facts["state"] == "initial" else facts["state"]
    table = _table(
        f"layers, and what compaction keeps of {state}",
        ("layer", "kind"),
        ("filters", "weights\neach", "positions", "thresh-\nolds", "density", "FLOPs", "kept"),
    )
    for layer in facts["layers"]:
        table.add_row(
            _plain(layer["layer"]),
            layer["kind"],
            *map(_number, (layer["filters"], layer["weights_per_filter"], layer["positions"])),
            _number(layer["thresholds"]) if layer["thresholds"] else "-",
            "-" if layer["density"] is None else f"{layer['density']:.3f}",
            _number(layer["flops"]),
            f"{layer['kept']:,} of {layer['filters']:,}",
        )
    shape = facts["input"]["shape"]
    labels = facts["labels"]
    _print(
        {
            "bundle": f"{facts['name']}, id {facts['id']}",
            "input": f"float32 {_sizes(['batch', *shape])}",
            "labels": f"{len(labels)}: {_some(labels)}",
            "train step": _cut(f"{step['form']} form: {step['reason']}"),
        },
        table,
        {
            **{_some(names): why for why, names in _reasons(facts["layers"]).items()},
            "parameters": f"{totals['parameters']:,}; thresholds {totals['thresholds']:,}",
            "weights": f"{totals['weights']:,}, compact {totals['kept_weights']:,}",
            "FLOPs": f"{_number(totals['flops'])}, compact {_number(totals['kept_flops'])}",
            "density": f"{density['mean_of_layers']:.3f} mean of layers, {_share(density['by_weights'])} by weights, "
            f"{_share(density['by_flops'])} by FLOPs",
            "on the wire": f"thresholds {wire['thresholds_f32']:,} bytes, f16 {wire['thresholds_f16']:,}; weights, "
            f"which never travel, {wire['weights_f32']:,}",
            **{f"engine {name}": _engine(engine) for name, engine in facts["engines"].items()},
            "files": ", ".join(f"{name} {size:,}" for name, size in facts["files"].items()) + " bytes",
            "made by": ", ".join(f"{name} {version}" for name, version in facts["producer"].items()),
        },
    )


def _reasons(layers: list[Facts]) -> dict[str, list[str]]:
    """Returns the layers by why they keep what they keep: most share a few reasons."""
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        reasons.setdefault(layer["reason"], []).append(layer["layer"])
    return reasons


def _engine(engine: Facts) -> str:
    operators = engine["operators"]
    needs = ", ".join(f"{name} {version}" for name, version in engine["requires"].items())
    counts = "; ".join(
        f"{role} {sum(operators[role].values())} of {len(operators[role])} kinds" for role in operators
    )
    return f"needs {needs or 'nothing'}. Operators: {counts or 'unknown'}"


def _show_graph(facts: Facts) -> None:
    table = _table(
        "layers with weights", ("layer", "operator", "shape", "dtype"), ("groups", "weights", "FLOPs")
    )
    for layer in facts["layers"]:
        table.add_row(
            _plain(layer["layer"]),
            _plain(layer["op"]),
            _plain(_sizes(layer["shape"])),
            layer["dtype"],
            *map(_number, (layer["groups"], layer["weights"], layer["flops"])),
        )
    totals = facts["totals"]
    external = ", ".join(
        f"{entry['file']} {'not there' if entry['bytes'] is None else format(entry['bytes'], ',')}"
        for entry in facts["external_data"]
    )
    _print(
        {
            "onnx": f"{facts['path']}, {facts['bytes']:,} bytes, {facts['precision']}",
            "needs": ", ".join(f"{name} {version}" for name, version in facts["opset"].items())
            + f", ir_version {facts['ir_version']}",
            "made by": facts["producer"] or "-",
            **_ends(facts),
        },
        table if facts["layers"] else None,
        {
            "parameters": _number(totals["parameters"]),
            "FLOPs": f"{_number(totals['flops'])} per example",
            "operators": _counts(facts["operators"]),
            **({"data beside it": external} if external else {}),
            **_proof(facts),
        },
    )


def _show_program(facts: Facts) -> None:
    about: dict[str, str] = {
        "executorch": f"{facts['path']}, {facts['bytes']:,} bytes, of which {facts['segment_bytes']:,} of data",
        "schema": f"{facts['schema']}, version {facts['version']}",
        "release": facts["release"] or "unknown: the file does not say, and no proof beside it does",
    }
    for method in facts["methods"]:
        about |= {
            f"method {method['name']}": f"{method['memory_bytes']:,} bytes of memory",
            **_ends(method),
            "delegates": _counts(method["delegates"]),
            "operators": _counts(method["operators"]),
        }
    _print(about, None, _proof(facts))


def _ends(facts: Facts) -> dict[str, str]:
    """Returns inputs and outputs in words."""
    said = {}
    for name in ("inputs", "outputs"):
        values = [
            " ".join(filter(None, (value.get("name", ""), value["dtype"], _sizes(value["shape"]))))
            + (" at most" if value.get("varies") else "")
            for value in facts[name]
        ]
        said[name] = _some(values)
    return said


def _proof(facts: Facts) -> dict[str, str]:
    """Returns the proof beside a model, and what else is to be noted, in words."""
    said = {}
    if (proof := facts["proof"]) is not None:
        said["proof"] = (
            f"{'equal to' if proof['equal'] else 'differs from'} the masked model to "
            f"{proof['relative_difference']:.1e} on {proof['examples']:,} examples, {proof['runtime']}"
        )
        if (precision := proof["precision"]) is not None:
            said["proof"] += (
                f"; then {precision['kind']}: accuracy {precision['accuracy_before']:.4f} => "
                f"{precision['accuracy_after']:.4f}, labels agree on {precision['argmax_agreement']:.1%}"
            )
    if facts["notes"]:
        said["note"] = "; ".join(facts["notes"])
    return said


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _print(above: dict[str, str], table: Table | None, below: dict[str, str]) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDTH
    for part in (above, table, below):
        if isinstance(part, Table):
            console.print(part)
        elif part:
            grid = Table.grid(padding=(0, 2, 0, 0))
            for name, value in part.items():
                # printed as they are: control characters of a hostile file must not reach the terminal
                grid.add_row(_plain(name), _plain(value))
            console.print(grid)


def _plain(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _cut(text: str) -> str:
    """Returns a text that fits on a screen: of a large model, the reasons of all layers fill several."""
    return text if len(text) <= MOST else f"{text[:MOST]} ... (--json has all of it)"


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:,}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _sizes(shape: Sequence[int | str | None] | None) -> str:
    return "" if shape is None else f"({', '.join('?' if size is None else str(size) for size in shape)})"


def _some(texts: Sequence[str], most: int = 10) -> str:
    return ", ".join(texts[:most]) + (f", ... ({len(texts)})" if len(texts) > most else "")


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
