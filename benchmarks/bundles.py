"""Bundles to measure: exported once for the sources as they are, then kept beside this file."""

import hashlib
import subprocess
import sys
from pathlib import Path

from spafl.bundle import Bundle

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / ".bundles"


def bundle(model: str, *, rows: bool = True, engines: tuple[str, ...] = ()) -> Bundle:
    """Returns `model`'s bundle with random weights, its train step in rows or in dense form, for those engines too."""
    sources = sorted(path for room in ("spafl", "trainer", "export") for path in (ROOT / room).glob("*.py"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    form = "-".join(("rows" if rows else "dense", *engines))
    path = KEPT / f"{model}-{form}-{digest}.zip"
    if not path.exists():
        print(f"exporting {path.name} once ...", file=sys.stderr)
        command = [sys.executable, "-c", "from spafl.cli import main; main()", "export", model]
        command += ["--rows" if rows else "--no-rows"]
        command += [option for engine in engines for option in ("--engine", engine)]
        subprocess.run([*command, "--no-parity", "--out", str(path)], check=True, capture_output=True)
    return Bundle.open(path)
