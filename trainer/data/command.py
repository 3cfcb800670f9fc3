"""`spafl data`: look at a dataset, and split it over devices."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from spafl.errors import SettingsError
from trainer.data.arrays import save_arrays
from trainer.data.dataset import Dataset, Split, input_spec
from trainer.data.partition import partition
from trainer.data.source import open_dataset

app = typer.Typer(
    help="Look at a dataset and split it over devices.", no_args_is_help=True, rich_markup_mode=None
)

Source = Annotated[
    str,
    typer.Argument(
        help="digits; a folder of IDX files, CIFAR-10 binary batches or class folders; a .zip of these; an .npz"
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Images of each label to read from class folders.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the split; of the test examples, where none are given.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

MAX_COLUMNS = 12
"""Clients shown side by side; more get a line each."""


@app.command()
def show(source: Source, limit: Limit = None, seed: Seed = 0, as_json: Json = False) -> None:
    """Show what a dataset holds."""
    split = open_dataset(source, limit=limit, seed=seed)
    spec = input_spec(split.train)
    facts = {
        "source": source,
        "digest": split.digest(),
        "shape": spec.shape,
        "dtype": split.train.x.dtype.name,
        "mean": spec.mean,
        "std": spec.std,
        "labels": split.train.labels,
        "train": split.train.counts().tolist(),
        "test": split.test.counts().tolist(),
    }
    if as_json:
        typer.echo(json.dumps(facts))
        return
    console = Console()
    console.print(
        f"{source}: {len(split.train)} training and {len(split.test)} test examples of {spec.shape}, "
        f"{facts['dtype']}, mean {spec.mean}, deviation {spec.std}",
        highlight=False,
    )
    console.print(_by_label({"train": split.train, "test": split.test}))


@app.command("split")
def split_over_clients(
    source: Source,
    out: Annotated[Path, typer.Option(help="Folder for partition.json and one .npz per client.")],
    clients: Annotated[int, typer.Option(min=1, help="How many devices.")] = 8,
    alpha: Annotated[
        float, typer.Option(help="Dirichlet parameter: the smaller, the fewer labels each.")
    ] = 0.5,
    iid: Annotated[bool, typer.Option("--iid", help="Deal out evenly instead.")] = False,
    minimum: Annotated[int, typer.Option(min=1, help="Training examples each client has at least.")] = 10,
    limit: Limit = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Split a dataset over clients, as client-000.npz ...; the whole test set goes to test.npz."""
    if next(out.glob("client-*.npz"), None) is not None:
        raise SettingsError(f"{out} already holds client files: give another --out, or empty it")
    split = open_dataset(source, limit=limit, seed=seed)
    dealt = partition(split, clients, alpha=None if iid else alpha, seed=seed, minimum=minimum)
    out.mkdir(parents=True, exist_ok=True)
    names, parts = [f"client-{number:03}.npz" for number in range(clients)], dealt.of(split)
    for name, part in zip(names, parts, strict=True):
        save_arrays(out / name, part.train, part.test)
    save_arrays(out / "test.npz", split.test)
    dealt.save(out / "partition.json")
    if as_json:
        typer.echo(json.dumps(_described(out, names, parts)))
        return
    numbered = {f"{number:03}": part for number, part in enumerate(parts)}
    console = Console()
    console.print(
        _by_label({number: part.train for number, part in numbered.items()})
        if clients <= MAX_COLUMNS
        else _by_client(numbered)
    )
    console.print(f"{out}: partition.json, test.npz and {clients} client files", highlight=False)


def _described(out: Path, names: list[str], parts: list[Split]) -> dict[str, Any]:
    return {
        "partition": str(out / "partition.json"),
        "test": str(out / "test.npz"),
        "labels": parts[0].train.labels,
        "clients": [
            {
                "file": str(out / name),
                "train": part.train.counts().tolist(),
                "test": part.test.counts().tolist(),
            }
            for name, part in zip(names, parts, strict=True)
        ],
    }


def _by_label(columns: dict[str, Dataset]) -> Table:
    """Returns the examples of each label: a line per label, a column per client or part, the sums last."""
    labels = next(iter(columns.values())).labels
    table = Table("label", title="examples by label", show_footer=True)
    table.columns[0].footer = "total"
    for heading, data in columns.items():
        table.add_column(heading, footer=str(len(data)), justify="right")
    counts = [data.counts() for data in columns.values()]
    for number, label in enumerate(labels):
        table.add_row(label, *(str(count[number]) if count[number] else "·" for count in counts))
    return table


def _by_client(clients: dict[str, Split]) -> Table:
    """Returns a line per client: its examples, the labels it has, and the share of its most frequent one."""
    table = Table("client", title="examples by client")
    for heading in ("train", "test", "labels", "largest label"):
        table.add_column(heading, justify="right")
    for number, part in clients.items():
        counts = part.train.counts()
        table.add_row(
            number,
            str(len(part.train)),
            str(len(part.test)),
            str((counts > 0).sum()),
            f"{counts.max() / counts.sum():.0%}",
        )
    return table
