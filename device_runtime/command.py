"""`spafl device`: the terminal's view of this room. Everything heavy is imported by the command that needs it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from device_runtime.compact_command import compact
from device_runtime.engine_command import build_executorch, engines, install_ort_training
from device_runtime.options import Data, Json, Seed, State, Threads, Validation
from device_runtime.report import print_facts

if TYPE_CHECKING:
    from device_runtime.journal import Identity
    from device_runtime.report import Report
    from device_runtime.state import DeviceState
    from device_runtime.watch import Watch
    from spafl.secret import Secret

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Enrol, train, compact and predict on a device.",
)

app.command("build-executorch")(build_executorch)
app.command("engines")(engines)
app.command("install-ort-training")(install_ort_training)
app.command("compact")(compact)

Server = Annotated[str, typer.Option(help="The server's URL.")]
Key = Annotated[
    str | None,
    typer.Option(
        envvar="SPAFL_ENROLMENT_KEY",
        help="Enrolment key. Other users can see options in the process list: prefer the variable or --key-file.",
    ),
]
KeyFile = Annotated[Path | None, typer.Option(help="File with the enrolment key.")]
EngineName = Annotated[str, typer.Option("--engine", help="What trains: onnx, executorch or ort_training.")]
CheckpointSeconds = Annotated[float, typer.Option(min=0, help="Save a round in progress this often.")]
CheckpointSteps = Annotated[int | None, typer.Option(min=1, help="And after so many steps.")]


@app.command()
def enrol(
    server: Server,
    state: State,
    key: Key = None,
    key_file: KeyFile = None,
    name: Annotated[str | None, typer.Option(help="A name operators see.")] = None,
    engine: EngineName = "onnx",
    json: Json = False,
) -> None:
    """Make this device known to a server; its token is kept in the state directory."""
    from device_runtime.engines import require_engine
    from device_runtime.errors import StateError
    from device_runtime.state import DeviceState

    require_engine(engine)
    with DeviceState(state) as opened:
        if opened.identity is not None:
            raise StateError(
                f"{state} is enrolled at {opened.identity.server} as {opened.identity.device} already"
            )
        identity = _enrol(opened, server, _secret(key, key_file), name, engine)
    print_facts({"device": identity.device, "server": identity.server}, json=json)


@app.command()
def run(
    state: State,
    run: Annotated[str, typer.Option(help="The run to take part in.")],
    data: Data,
    server: Annotated[str | None, typer.Option(help="The server's URL; needed to enrol.")] = None,
    key: Key = None,
    key_file: KeyFile = None,
    name: Annotated[str | None, typer.Option(help="A name operators see.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Stop after so many counted updates.")] = None,
    engine: EngineName = "onnx",
    threads: Threads = 1,
    validation: Validation = 0.2,
    seed: Seed = 0,
    checkpoint_seconds: CheckpointSeconds = 15.0,
    checkpoint_steps: CheckpointSteps = None,
    json: Json = False,
) -> None:
    """Take part in a run until it is over: check in, catch up, train, report, sleep.

    Enrols first where the state directory is new. SIGTERM or Ctrl-C saves and exits with 0; the same command goes on.
    """
    from device_runtime.agent import Agent, Work
    from device_runtime.client import Client
    from device_runtime.data import load_data
    from device_runtime.engines import open_engine, require_engine
    from device_runtime.errors import StateError
    from device_runtime.training import Tempo

    require_engine(engine)
    with _working(state, json) as (opened, watch, report):
        identity = opened.identity
        if identity is None:
            if server is None:
                raise StateError(f"{state} is not enrolled: give --server and an enrolment key")
            identity = _enrol(opened, server, _secret(key, key_file), name, engine)
            report.event("enrolled", device=identity.device, server=identity.server)
        elif server is not None and server.rstrip("/") != identity.server:
            raise StateError(
                f"{state} is enrolled at {identity.server}, and its token goes nowhere else: give another --state, or "
                f"change `server` in {state / 'identity.json'} if the same server moved"
            )
        with Client(identity.server, identity.token, wait=watch.sleep) as client:
            Agent(
                client,
                opened,
                Work(
                    run,
                    engine=engine,
                    rounds=rounds,
                    seed=seed,
                    tempo=Tempo(checkpoint_seconds, checkpoint_steps),
                ),
                load=lambda manifest: load_data(data, manifest, validation=validation, seed=seed),
                open_engine=lambda bundle: open_engine(engine, bundle, threads=threads),
                watch=watch,
                report=report,
            ).work()


@app.command()
def train(
    bundle: Annotated[Path, typer.Option(help="The bundle, a directory or a .zip.")],
    state: State,
    data: Data,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in all, those already trained included.")] = 15,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs per round.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    lr: Annotated[float, typer.Option(help="Learning rate of the weights.")] = 0.01,
    lr_decay: Annotated[float, typer.Option(help="Factor of lr per round.")] = 1.0,
    threshold_lr: Annotated[float | None, typer.Option(help="Of the thresholds; default: lr.")] = None,
    momentum: Annotated[float, typer.Option(help="Of SGD.")] = 0.9,
    coeff: Annotated[float, typer.Option(help="Weight of the regulariser sum exp(-threshold).")] = 0.002,
    ramp: Annotated[str, typer.Option(help="none, or fmnist: let coeff grow over the rounds.")] = "none",
    clip: Annotated[float | None, typer.Option(help="Largest global gradient norm; default: none.")] = None,
    engine: EngineName = "onnx",
    threads: Threads = 1,
    validation: Validation = 0.2,
    seed: Seed = 0,
    checkpoint_seconds: CheckpointSeconds = 15.0,
    checkpoint_steps: CheckpointSteps = None,
    json: Json = False,
) -> None:
    """Train alone, without a server: the same engine and rounds, and thresholds nobody averages."""
    from device_runtime.data import load_data
    from device_runtime.engines import open_engine, require_engine
    from device_runtime.local import adopt, train_locally
    from device_runtime.training import Tempo
    from spafl.bundle import Bundle
    from spafl.errors import SettingsError
    from spafl.hyperparameters import Hyperparameters
    from spafl.record import RecordError

    try:
        hyperparameters = Hyperparameters.from_json(
            {
                "epochs": epochs,
                "batch_size": batch_size,
                "lr": lr,
                "lr_decay": lr_decay,
                "threshold_lr": threshold_lr,
                "momentum": momentum,
                "coeff": coeff,
                "ramp": ramp,
                "clip": clip,
            }
        )
    except RecordError as error:
        raise SettingsError(f"--{error.path[0].replace('_', '-')}: {error.problem}") from error
    require_engine(engine)
    with _working(state, json) as (opened, watch, report):
        held = adopt(opened, Bundle.open(bundle))
        train_locally(
            opened,
            held,
            open_engine(engine, held, threads=threads),
            load_data(data, held.manifest, validation=validation, seed=seed),
            rounds,
            hyperparameters,
            seed=seed,
            watch=watch,
            report=report,
            tempo=Tempo(checkpoint_seconds, checkpoint_steps),
        )
        report.event("finished", run=opened.journal.run, updates=0)


@app.command()
def status(state: State, json: Json = False) -> None:
    """Show who this device is and how far its model is; works while the agent runs."""
    from device_runtime.state import read_identity, read_journal, snapshot
    from spafl import algorithm

    identity, journal = read_identity(state), read_journal(state)
    facts: dict[str, object] = {"state": str(state)}
    facts |= {"server": identity.server, "device": identity.device} if identity else {"device": None}
    if journal is not None:
        shown = ("run", "bundle", "phase", "version", "trained", "updates", "late")
        facts |= {name: getattr(journal, name) for name in shown}
        facts["round"] = journal.lease.round if journal.lease else None
    if journal is not None and journal.state is not None:
        _, bundle, tensors = snapshot(state)
        facts["density"] = algorithm.densities(bundle.manifest.layout, tensors)
    print_facts(facts, json=json)


@app.command()
def predict(
    sources: Annotated[
        list[str], typer.Argument(help="Image files, or one data source to measure accuracy on.")
    ],
    state: State,
    model: Annotated[Path | None, typer.Option(help="A compact model; default: the state's.")] = None,
    threads: Threads = 1,
    json: Json = False,
) -> None:
    """Label images with the compact model, or measure its accuracy on labelled examples."""
    import numpy as np

    from device_runtime.data import is_image, load_data, load_images
    from device_runtime.errors import DataError
    from device_runtime.examples import Examples
    from device_runtime.state import snapshot

    manifest = snapshot(state)[1].manifest
    made = (state / "compact" / "model.onnx", state / "program" / "model.pte")
    file = model or next((path for path in made if path.is_file()), made[0])
    if file.suffix == ".pte":
        from device_runtime.program import predict as infer
    else:
        from device_runtime.compaction import predict as infer
    if all(is_image(source) for source in sources):
        pixels = load_images(sources, manifest)
        unlabelled = Examples(pixels, np.zeros(len(pixels), np.int64))
        logits = infer(file, unlabelled.inputs(manifest.input), threads=threads)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        odds /= odds.sum(axis=1, keepdims=True)
        for source, row in zip(sources, odds, strict=True):
            best = int(row.argmax())
            print_facts(
                {"file": source, "label": manifest.labels[best], "probability": float(row[best])}, json=json
            )
        return
    if len(sources) > 1:
        raise DataError(
            f"got {len(sources)} sources that are not all images: give image files, or one data source"
        )
    local = load_data(sources[0], manifest, validation=0.0)
    examples = local.validation if len(local.validation) else local.train
    logits = infer(file, examples.inputs(manifest.input), threads=threads)
    right = int((logits.argmax(axis=1) == examples.y).sum())
    print_facts({"examples": len(examples), "right": right, "accuracy": right / len(examples)}, json=json)


@contextmanager
def _working(state: Path, json: bool) -> Iterator[tuple["DeviceState", "Watch", "Report"]]:
    """Yields the opened state, a watch and a report; a stop is a success, and a full disk an error in words."""
    from contextlib import ExitStack

    from device_runtime.errors import StateError, Stopped
    from device_runtime.report import JsonLines, Terminal
    from device_runtime.state import DeviceState
    from device_runtime.watch import Watch

    with ExitStack() as stack:
        opened = stack.enter_context(DeviceState(state))
        lines = json or not sys.stdout.isatty()
        report: Report = JsonLines() if lines else stack.enter_context(Terminal())
        watch = stack.enter_context(Watch(report))
        try:
            yield opened, watch, report
        except Stopped:
            report.event("stopped", phase=opened.journal.phase if opened.begun else "idle")
        except OSError as error:
            raise StateError(
                f"{error}: what was saved before stands, and the same command goes on from it"
            ) from error


def _enrol(state: "DeviceState", server: str, key: "Secret", name: str | None, engine: str) -> "Identity":
    from device_runtime.agent import capabilities
    from device_runtime.client import Client
    from spafl.errors import SettingsError
    from spafl.protocol import EnrolmentRequest
    from spafl.record import RecordError

    try:
        request = EnrolmentRequest(name=name, capabilities=capabilities(engine))
    except RecordError as error:
        raise SettingsError(f"--name {name!r}: {error.problem}") from error
    with Client(server) as client:
        identity = client.enrol(key, request)
    state.enrolled(identity)
    return identity


def _secret(key: str | None, file: Path | None) -> "Secret":
    from spafl.errors import SettingsError
    from spafl.secret import Secret

    if file is not None:
        try:
            key = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"cannot read the enrolment key from {file}: {error}") from error
    if not key:
        raise SettingsError("no enrolment key: set SPAFL_ENROLMENT_KEY, or give --key-file or --key")
    return Secret(key)
