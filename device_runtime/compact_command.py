"""`spafl device compact`."""

from pathlib import Path
from typing import Annotated

import typer

from device_runtime.options import Data, Json, Seed, State, Threads, Validation
from device_runtime.report import print_facts


def compact(
    state: State,
    data: Data,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the model and proof.json; default: in the state.")
    ] = None,
    programs: Annotated[
        str | None,
        typer.Option(help="URL of a program service (`spafl programs`): makes model.pte, for ExecuTorch."),
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with that service's token; default: $SPAFL_PROGRAM_TOKEN.")
    ] = None,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Then weights and computation in float16. Needs the package onnx.")
    ] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Then weights and activations in int8, calibrated on training examples. Needs the package onnx.",
        ),
    ] = False,
    opset: Annotated[
        int | None, typer.Option(help="Opset of model.onnx; default: the bundle's. Needs the package onnx.")
    ] = None,
    round_to: Annotated[
        str,
        typer.Option(
            help="Keep as many filters of a layer as this divides, a few pruned ones as zeros; auto: what is fastest "
            "here. Processors compute 4 to 16 channels at a time.",
        ),
    ] = "1",
    max_drop: Annotated[
        float,
        typer.Option(
            min=0,
            max=100,
            help="Points of accuracy on held-out examples that --fp16 or --int8 may cost; more: nothing is written.",
        ),
    ] = 2.0,
    threads: Threads = 1,
    validation: Validation = 0.2,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Cut the pruned filters out of this device's model, and prove on its own examples that nothing else changed.

    With onnxruntime all of it happens here. ExecuTorch's programs are made elsewhere: a program service is told which
    filters are active, never a weight, and this device puts its weights into what it answers.

    --fp16 and --int8 convert the compact model after it is proven, and change its numbers: what that costs is measured
    on the examples held out from training (give the same --validation and --seed), and written into proof.json. If it
    costs more than --max-drop, the command fails and the model that was there stays.
    """
    from device_runtime.conversion import Conversion
    from device_runtime.data import load_data
    from device_runtime.errors import DataError
    from device_runtime.state import snapshot
    from spafl.errors import SettingsError

    if fp16 and int8:
        raise SettingsError("--fp16 and --int8 exclude each other: choose one")
    if programs is not None and (fp16 or int8 or opset is not None):
        raise SettingsError("--fp16, --int8 and --opset are of model.onnx: leave them or --programs out")
    if round_to != "auto" and not (round_to.isdecimal() and 1 <= int(round_to) <= 1024):
        raise SettingsError(f"--round-to {round_to!r}: expected a number of 1 to 1024, or auto")
    if programs is not None and round_to != "1":
        raise SettingsError("--round-to is of model.onnx: leave it or --programs out")
    wanted = Conversion("int8" if int8 else "fp16" if fp16 else "fp32", opset, max_drop=max_drop / 100)
    wanted.require()
    _, bundle, tensors = snapshot(state)
    local = load_data(data, bundle.manifest, validation=validation, seed=seed)
    if (fp16 or int8) and not len(local.validation):
        raise DataError(
            f"{data} leaves no examples to measure accuracy on: give a --validation above 0, or more examples"
        )
    examples = local.validation if len(local.validation) else local.train
    inputs = examples.inputs(bundle.manifest.input)
    if programs is None:
        from device_runtime import compaction

        conversion = wanted.on(examples, local.train, bundle.manifest.input, seed)
        folder, name = out or state / "compact", compaction.MODEL
        if round_to == "auto":
            multiple = compaction.fastest_multiple(bundle, tensors, inputs, threads=threads)
        else:
            multiple = int(round_to)
        proof = compaction.compact(
            bundle, tensors, folder, inputs, conversion=conversion, threads=threads, multiple=multiple
        )
    else:
        from device_runtime import program

        folder, name = out or state / "program", program.MODEL
        with program.service(programs, token_file) as client:
            proof = program.compact(bundle, tensors, folder, inputs, client, threads=threads)
    facts = {"model": str(folder / name), **proof.to_json()}
    if not json:  # a line per layer reads better than a list of them
        del facts["layers"], facts["precision"]
        if proof.precision is not None:
            told = proof.precision.to_json()
            facts[told.pop("kind")] = told
        facts |= {entry.layer: f"{entry.total} => {entry.kept}  {entry.reason}" for entry in proof.layers}
    print_facts(facts, json=json)
