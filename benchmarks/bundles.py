"""Bundles to measure: exported once for the sources as they are, then kept beside this file."""

import hashlib
import subprocess
import sys
from pathlib import Path

from spafl.bundle import Bundle

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / ".bundles"


def bundle(model: str, *, rows: bool = True) -> Bundle:
    """Returns `model`'s bundle with random weights, its train step in rows or in dense form."""
    sources = sorted(path for room in ("spafl", "trainer", "export") for path in (ROOT / room).glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    path = KEPT / f"{model}-{'rows' if rows else 'dense'}-{digest}.zip"
    if not path.exists():
        print(f"exporting {path.name} once ...", file=sys.stderr)
        form = "--rows" if rows else "--no-rows"
        command = [sys.executable, "-c", "from spafl.cli import main; main()", "export", model, form]
        subprocess.run([*command, "--no-parity", "--out", str(path)], check=True, capture_output=True)
    return Bundle.open(path)
