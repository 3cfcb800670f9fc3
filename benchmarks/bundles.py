"""Bundles to measure: exported once for the sources as they are, then kept beside this file."""

import hashlib
import subprocess
import sys
from pathlib import Path

import safetensors.numpy
import torch

from export.build import compaction_of
from export.compact import CompactModel
from export.depthwise import with_widths
from export.inference import infer_graph, masked_graph
from export.training import state_tensors
from spafl.bundle import INITIAL_STATE, Bundle, write_bundle
from spafl.manifest import EngineFiles, FileEntry, InputSpec, Manifest, TrainStep
from trainer.graph import token_ids
from trainer.models import MODELS
from trainer.sparsify import layout_of, sparsify

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


def inference_bundle(model: str, folder: Path) -> Bundle:
    """Returns a bundle of `model` that can be compacted but not trained: tracing its training step takes minutes."""
    torch.manual_seed(0)
    masked = sparsify(MODELS[model]())
    shape: tuple[int, ...] = masked.shape  # type: ignore[assignment]
    layout = layout_of(masked)
    tensors = state_tensors(masked, CompactModel(masked, shape, dropped=lambda group: False))
    compact = CompactModel(masked, shape, dropped=lambda group: group.drops)
    graphs = {
        "infer": infer_graph(compact, layout, tensors, shape),
        "masked": masked_graph(masked, tensors, shape),
    }
    files = {f"{role}.onnx": graph.SerializeToString() for role, graph in graphs.items()}
    files["infer.onnx"], widths = with_widths(files["infer.onnx"], compact.depthwise)
    labels = masked(torch.zeros(2, *shape)).shape[1]
    manifest = Manifest(
        name=model,
        layout=layout,
        state=tensors,
        input=InputSpec(shape=shape, mean=(0.0,) * shape[0], std=(1.0,) * shape[0], ids=token_ids(masked)),
        labels=tuple(map(str, range(labels))),
        train_step=TrainStep(form="dense", reason="not exported"),
        compaction=compaction_of(compact, widths),
        engines={
            "onnx": EngineFiles(files={role: f"{role}.onnx" for role in graphs}, requires={}, operators={})
        },
        files={file: FileEntry(bytes=0, sha256="0" * 64) for file in files},
        producer={},
    )
    state = {tensor.name: masked.state_dict()[tensor.name].numpy() for tensor in tensors}
    files[INITIAL_STATE] = safetensors.numpy.save(state)
    return write_bundle(folder / f"{model}.zip", manifest, files)
