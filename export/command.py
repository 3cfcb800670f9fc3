"""`spafl export`: a PyTorch model becomes a bundle."""

import json
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from export import program_command
from export.build import Export, export_bundle
from export.parity import Check
from export.source import load_model
from spafl.errors import SettingsError
from spafl.manifest import InputSpec
from trainer.data import Split, input_spec, model_input, open_dataset
from trainer.graph import token_ids
from trainer.models import MODELS
from trainer.sparsify import sparsify

app = typer.Typer(rich_markup_mode=None)
console = Console(stderr=True)


class StraightThrough(StrEnum):
    """How gradients pass the mask."""

    identity = "identity"
    cifar_release = "cifar-release"


class Scale(StrEnum):
    """The unit of the thresholds."""

    unit = "unit"
    layer = "layer"


class Divisor(StrEnum):
    """What a convolution's catch-up step is divided by."""

    kernel = "kernel"
    n_in = "n_in"


@app.command()
def export(
    model: Annotated[
        str, typer.Argument(help=f"{', '.join(MODELS)}, or module:function returning a torch.nn.Module.")
    ],
    out: Annotated[Path, typer.Option(help="Bundle to write: a .zip, or a directory.")] = Path("bundle.zip"),
    data: Annotated[
        str | None,
        typer.Option(
            help="Dataset for labels, input scaling and the parity check: digits, a folder, .zip or .npz."
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Input shape such as 3,32,32, where no data tells it.")
    ] = None,
    labels: Annotated[
        int | None, typer.Option(min=2, help="Number of labels, where no data tells it.")
    ] = None,
    init: Annotated[
        Path | None, typer.Option(help="Start weights: .safetensors, or a torch state_dict.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the bundle; the model's by default.")] = None,
    gate: Annotated[
        bool, typer.Option(help="Pruned channels are exactly 0 behind their norm. --no-gate: as published.")
    ] = True,
    mask_head: Annotated[
        bool, typer.Option("--mask-head", help="Mask the output layer too, as published.")
    ] = False,
    ste: Annotated[
        StraightThrough, typer.Option(help="Straight-through surrogate of the mask's gradient.")
    ] = (StraightThrough.identity),
    scale: Annotated[
        Scale, typer.Option(help="Unit of the thresholds: 1, or each layer's mean |w| now.")
    ] = Scale.unit,
    conv_divisor: Annotated[
        Divisor,
        typer.Option(help="Divisor of a convolution's catch-up step: kh*kw as published, or its inputs."),
    ] = Divisor.kernel,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="Engine to write programs for, besides onnx: executorch or ort_training. Repeatable."
        ),
    ] = None,
    rows: Annotated[
        bool, typer.Option(help="Train active rows only, where that is exact. --no-rows: whole tensors.")
    ] = True,
    pte: Annotated[
        Path | None,
        typer.Option(
            help="Write a compact ExecuTorch program here, and no bundle; needs --mask-from, --data."
        ),
    ] = None,
    mask_from: Annotated[
        Path | None,
        typer.Option(help="A device's state file, whose active filters and weights --pte is made of."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the initial weights and of the parity check.")] = 0,
    parity: Annotated[bool, typer.Option(help="Check every graph against PyTorch before writing.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Turn a PyTorch model into a bundle that devices train, and prove that it computes the same."""
    if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise SettingsError(f"name {name!r}: expected letters, digits, '.', '_' and '-', at most 64")
    if (pte is None) != (mask_from is None):
        raise SettingsError(
            "--pte and --mask-from go together: a compact program is made for one device's state"
        )
    split = open_dataset(data) if data else None
    plain = load_model(model, labels or (len(split.train.labels) if split else None), init, seed)
    wanted = _shape(plain, shape)
    if split is not None and wanted is not None:
        split = split.shaped(wanted)
    spec = _input(plain, split, wanted)
    sparse = sparsify(plain, gate=gate, mask_head=mask_head, ste=ste.value, scale=scale.value)
    outputs = _outputs(sparse, spec)
    texts = split.train.labels if split else tuple(str(label) for label in range(labels or outputs))
    if len(texts) != outputs:
        raise SettingsError(
            f"the model has {outputs} outputs, but there are {len(texts)} labels: {texts[:12]}"
        )
    examples = (model_input(split.train.x[:2048], spec), split.train.y[:2048]) if split else None
    if pte is not None and mask_from is not None:
        program_command.write(
            sparse, spec, texts, mask_from, pte, examples[0] if examples else None, as_json=as_json
        )
        return
    started = time.perf_counter()
    result = export_bundle(
        sparse,
        out,
        name=name or _name(model),
        input=spec,
        labels=texts,
        options={
            "model": model,
            "gate": gate,
            "mask_head": mask_head,
            "ste": ste.value,
            "scale": scale.value,
            "conv_divisor": conv_divisor.value,
        },
        conv_divisor=conv_divisor.value,
        engines=engine or (),
        rows=rows,
        parity=parity,
        examples=examples,
        seed=seed,
        stage=_stage,
    )
    if as_json:
        typer.echo(json.dumps(_summary(result, out, time.perf_counter() - started)))
    else:
        _show(result, out)


def _name(source: str) -> str:
    """Returns a bundle name for a model named on the command line: the function's, without what names may not hold."""
    text = source.rpartition(":")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "-", text).lstrip("._-")[:64] or "model"


def _shape(model: torch.nn.Module, shape: str | None) -> tuple[int, ...] | None:
    """Returns the shape of an example as `--shape` or the model itself names it; None if neither does."""
    if shape is None:
        known = getattr(model, "shape", None)
        return None if known is None else tuple(known)
    try:
        sizes = tuple(int(size) for size in shape.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise SettingsError(f"--shape {shape!r}: expected numbers such as 3,32,32")
    return sizes


def _input(model: torch.nn.Module, split: Split | None, wanted: tuple[int, ...] | None) -> InputSpec:
    """Returns how examples enter the model, as the data tell, or without data its shape."""
    if split is not None:
        spec = input_spec(split.train)
        if wanted not in (None, spec.shape):
            raise SettingsError(
                f"the model takes {wanted}, the data's examples are {spec.shape}: choose another model"
            )
    elif not wanted:
        raise SettingsError("what does the model take? Give --data, or --shape such as 3,32,32")
    else:
        spec = InputSpec(shape=wanted, mean=(0.0,) * wanted[0], std=(1.0,) * wanted[0])
    if (ids := token_ids(model)) is None:
        return spec
    # one of the first axis each, as of any input; ids are neither centred nor scaled
    return InputSpec(shape=spec.shape, mean=(0.0,) * spec.shape[0], std=(1.0,) * spec.shape[0], ids=ids)


def _outputs(model: torch.nn.Module, spec: InputSpec) -> int:
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *spec.shape))
    except (RuntimeError, ValueError, IndexError) as error:  # layers check sizes each in their own way
        raise SettingsError(
            f"the model does not take examples of shape {spec.shape}; --shape gives another: {error}"
        ) from error
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2 or len(logits) != 2:
        got = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
        raise SettingsError(f"expected logits (batch, labels), the model returned {got}")
    return int(logits.shape[1])


@contextmanager
def _stage(name: str) -> Iterator[None]:
    started = time.perf_counter()
    with console.status(f"{name} ..."):
        yield
    console.print(f"{name:<28} {time.perf_counter() - started:5.1f} s", style="dim", highlight=False)


def _show(result: Export, out: Path) -> None:
    manifest = result.bundle.manifest
    if result.checks:
        console.print(_parity_table(result.checks))
    console.print(
        f"train step: {manifest.train_step.form} form. {manifest.train_step.reason}", highlight=False
    )
    weights = sum(entry.out * entry.n_in for entry in manifest.compaction)
    typer.echo(
        f"{out}: {manifest.name}, {manifest.layout.size} thresholds for {weights:,} weights, "
        f"{sum(entry.bytes for entry in manifest.files.values()):,} bytes, id {result.bundle.id}"
    )


def _parity_table(checks: tuple[Check, ...]) -> Table:
    """Returns the largest relative difference of each check at each density; worst tensors stand in parity.json."""
    densities = sorted({check.density for check in checks}, reverse=True)
    title = "Parity with PyTorch eager: largest relative difference, by density"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("check", *(f"{density:g}" for density in densities), "allowed"):
        table.add_column(column, justify="left" if column == "check" else "right", no_wrap=True)
    for name in dict.fromkeys(check.check for check in checks):
        row = {check.density: check for check in checks if check.check == name}
        allowed = max(check.tolerance for check in row.values())
        table.add_row(name, *[f"{row[density].difference:.1e}" for density in densities], f"{allowed:.0e}")
    return table


def _summary(result: Export, out: Path, seconds: float) -> dict[str, object]:
    manifest = result.bundle.manifest
    return {
        "bundle": str(out),
        "id": result.bundle.id,
        "name": manifest.name,
        "layout": manifest.layout.id,
        "thresholds": manifest.layout.size,
        "weights": sum(entry.out * entry.n_in for entry in manifest.compaction),
        "train_step": manifest.train_step.to_json(),
        "checks": [_check(check) for check in result.checks],
        "seconds": round(seconds, 2),
    }


def _check(check: Check) -> dict[str, object]:
    return {name: getattr(check, name) for name in ("check", "density", "worst", "difference", "tolerance")}
