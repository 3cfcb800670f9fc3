"""A sparsified model -> its bundle: the graphs, the initial state, the manifest and the proof."""

import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import nn

from export.compact import CompactModel
from export.flow import ChannelFlows
from export.inference import infer_graph, masked_graph
from export.lowering import IR_VERSION, OPSET
from export.parity import Check, check_parity, to_bytes
from export.round import begin_round_graph, end_round_graph
from export.training import form, state_tensors, train_step_graph
from spafl import __version__
from spafl.bundle import INITIAL_STATE, Bundle, write_bundle
from spafl.errors import SettingsError
from spafl.layout import Floats
from spafl.manifest import Compaction, EngineFiles, InputSpec, Manifest
from spafl.ort_training import find_python
from trainer.masked import Masked
from trainer.sparsify import layout_of

PARITY = "parity.json"
ROLES = ("begin_round", "train_step", "end_round", "infer", "masked")

Stage = Callable[[str], AbstractContextManager[object]]


@dataclass(frozen=True)
class Export:
    """A written bundle and the checks it passed; none if they were switched off."""

    bundle: Bundle
    checks: tuple[Check, ...]


def export_bundle(
    model: nn.Module,
    out: Path | str,
    *,
    name: str,
    input: InputSpec,
    labels: tuple[str, ...],
    options: dict[str, str | bool | float] | None = None,
    conv_divisor: str = "kernel",
    engines: Sequence[str] = ("onnx",),
    rows: bool = True,
    parity: bool = True,
    examples: tuple[Floats, NDArray[np.int64]] | None = None,
    seed: int = 0,
    stage: Stage = lambda name: nullcontext(),
    progress: Callable[[Check], None] = lambda check: None,
) -> Export:
    """Returns the bundle of a sparsified `model`, written to `out` (.zip or directory) after its checks passed.

    input, labels  what the model takes and tells apart
    options        how the model was sparsified, for the record
    conv_divisor   of the catch-up step (`trainer.sparsify.layout_of`)
    engines        whose files the bundle holds; those of onnx it always does
    rows           let the train step take active rows only where that is exact; False: whole tensors
    parity         check every graph against eager PyTorch before anything is written
    examples       (n, *shape), (n,) for the check; random ones if None
    stage          entered around each piece of work, with its name, for progress

    Raises:
        LoweringError: an operation that cannot be expressed.
        ParityError: a graph differs from PyTorch.
        SettingsError: the model cannot be traced, or has no masked layers.
    """
    others = {engine: _other_engine(engine) for engine in engines if engine != "onnx"}
    model = model.cpu().float()
    shape = input.shape
    layout = layout_of(model, "n_in" if conv_divisor == "n_in" else "kernel")
    training = CompactModel(model, shape, dropped=lambda flow: rows and flow.exact)
    tensors, step = state_tensors(model, training), form(training)
    graphs: dict[str, onnx.ModelProto] = {}
    with stage("train step"):
        graphs["train_step"] = train_step_graph(training.for_training(), tensors, shape)
    with stage("begin and end of a round"):
        graphs["begin_round"] = begin_round_graph(layout, tensors)
        graphs["end_round"] = end_round_graph(layout, tensors)
    with stage("inference"):
        inferring = CompactModel(model, shape, dropped=lambda flow: flow.drops).for_inference()
        graphs["infer"] = infer_graph(inferring, layout, tensors, shape)
        graphs["masked"] = masked_graph(model, tensors, shape)
    state = {tensor.name: model.state_dict()[tensor.name].numpy() for tensor in tensors}
    files = {f"{role}.onnx": graphs[role].SerializeToString(deterministic=True) for role in ROLES}
    by_engine = {"onnx": _engine(graphs)}
    for engine, made_by in others.items():
        with stage(f"{engine} programs"):
            programs, by_engine[engine] = made_by(model, layout, tensors, shape)
        files |= programs
    manifest = Manifest(
        name=name,
        layout=layout,
        state=tensors,
        input=input,
        labels=labels,
        options=options or {},
        train_step=step,
        compaction=tuple(_compaction(ChannelFlows(model, shape))),
        engines=by_engine,
        files={file: {"bytes": 0, "sha256": "0" * 64} for file in files},
        producer=_producer(),
    )
    checks: tuple[Check, ...] = ()
    if parity:
        with stage("parity with PyTorch"):
            checks = check_parity(model, manifest, files, seed=seed, examples=examples, progress=progress)
        files[PARITY] = to_bytes(checks)
    files[INITIAL_STATE] = safetensors.numpy.save(state)
    return Export(write_bundle(out, manifest, files), checks)


def _compaction(flows: ChannelFlows) -> Iterator[Compaction]:
    for name, module in flows.modules.items():
        if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear) or name not in flows.positions:
            continue
        flow, source = flows.by_layer.get(name), flows.sources.get(name)
        masked = isinstance(module, Masked)
        yield Compaction(
            layer=name,
            out=len(module.weight),
            n_in=module.weight[0].numel(),
            positions=flows.positions[name],
            reads=source[0].layer if source else None,
            drops=flow is not None and flow.drops,
            reason=(flow.refusal or "pruned channels are left out") if flow and masked else "not masked",
        )


def _engine(graphs: dict[str, onnx.ModelProto]) -> EngineFiles:
    operators = {role: Counter(node.op_type for node in graph.graph.node) for role, graph in graphs.items()}
    return EngineFiles(
        files={role: f"{role}.onnx" for role in graphs},
        requires={"opset": str(OPSET), "ir_version": str(IR_VERSION)},
        operators={role: dict(sorted(counts.items())) for role, counts in operators.items()},
    )


def _other_engine(name: str) -> Callable[..., tuple[dict[str, bytes], EngineFiles]]:
    """Returns what makes the files of an engine: (model, layout, tensors, shape) -> bytes by file name, entry.

    Raises:
        SettingsError: no such engine, or what its export needs is not installed.
    """
    if name == "executorch":
        from export.executorch_programs import executorch_programs, require_executorch

        require_executorch()
        return executorch_programs
    if name == "ort_training":
        from export.ort_training_artifacts import ort_training_files

        find_python()
        return ort_training_files
    raise SettingsError(f"no engine {name!r} to export for: choose onnx, executorch or ort_training")


def _producer() -> dict[str, str]:
    versions = {package: version(package) for package in ("onnx", "onnxscript", "onnxruntime", "numpy")}
    return {"spafl": __version__, "python": platform.python_version(), "torch": torch.__version__, **versions}
