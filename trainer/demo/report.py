"""Placeholder."""

from rich.table import Table


def summary(r):
    return Table()


def write_report(r, t, o):
    (o / "results.json").write_text(r.model_dump_json(indent=1))
    return o / "report.html"
