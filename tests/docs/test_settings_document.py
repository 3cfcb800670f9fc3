"""docs/settings.md lists every setting of the server as the code has it."""

import inspect
from pathlib import Path

from server_api import command
from server_api.settings import ENV_PREFIX, SETTINGS, Settings

DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"


def expected() -> list[str]:
    """The rows of the table."""
    options = set(inspect.signature(command.serve).parameters)
    rows = []
    for name, meaning in SETTINGS.items():
        default = Settings.model_fields[name].default
        option = f"`--{name.replace('_', '-')}`" if name in options else ""
        shown = "" if default is None else f"`{default}`"
        rows.append(f"| `{ENV_PREFIX}{name.upper()}` | {option} | {shown} | {meaning} |")
    return rows


def test_the_table_is_the_code() -> None:
    table = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    assert table == expected(), "paste these rows:\n" + "\n".join(expected())
