"""`spafl programs`: compact programs for devices, made from their masks; and what `spafl export --pte` does."""

import ipaddress
import json
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import safetensors.numpy
import typer
from safetensors import SafetensorError
from torch import nn

from export.compact_program import proof_path, require_xnnpack, source_manifest, write_program
from export.source import bundle_model
from spafl.bundle import Bundle
from spafl.errors import SettingsError
from spafl.layout import Floats
from spafl.manifest import InputSpec
from spafl.program import TOKEN_VARIABLE
from spafl.proof import Proof
from spafl.secret import Secret

BASE = "base"
"""In a device's state file beside the tensors: the global thresholds it has caught up to."""

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def programs(
    bundle: Annotated[Path, typer.Argument(help="The bundle whose devices ask, a directory or a .zip.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="What it was exported from, a name or module:function; default: what the bundle says."
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8010,
    token_file: Annotated[
        Path | None,
        typer.Option(help=f"File with the token devices must send; default: ${TOKEN_VARIABLE}."),
    ] = None,
    token: Annotated[str | None, typer.Option(envvar=TOKEN_VARIABLE, hidden=True)] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its private key, PEM.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON when it is up.")] = False,
) -> None:
    """Make compact ExecuTorch programs for devices that send only which filters are active.

    Runs until it is interrupted. No weight of a device arrives here: programs leave with holes where weights belong.
    """
    require_xnnpack()
    secret = _token(token, token_file)
    if secret is None and not _is_loopback(host):
        raise SettingsError(
            f"listening on {host} without a token would let anybody ask: set {TOKEN_VARIABLE} or give --token-file"
        )
    opened = Bundle.open(bundle)
    source = bundle_model(opened, model)
    # imported here: `spafl export --pte` needs no web framework
    import uvicorn

    from export.program_service import ProgramMaker, create_app

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    service = create_app(ProgramMaker(source, opened), secret)
    try:
        config = uvicorn.Config(
            service, log_level="warning", access_log=False, ssl_certfile=tls_cert, ssl_keyfile=tls_key
        )
        config.load()
    except OSError as error:  # ssl.SSLError among them
        raise SettingsError(f"cannot use certificate {tls_cert} and its key: {error}") from error
    with _listen(host, port) as listener:
        shown = f"[{host}]" if ":" in host else host
        url = f"{'https' if tls_cert else 'http'}://{shown}:{listener.getsockname()[1]}"
        for number in (signal.SIGINT, signal.SIGTERM):
            # before the server takes these signals over, and when it has stopped and raises them again
            signal.signal(number, _exit)
        if as_json:
            typer.echo(json.dumps({"url": url, "bundle": opened.id}))
        else:
            typer.echo(f"programs of {opened.manifest.name} ({opened.id[:12]}) at {url}")
        uvicorn.Server(config).run(sockets=[listener])


def write(
    model: nn.Module,
    spec: InputSpec,
    labels: tuple[str, ...],
    state: Path,
    out: Path,
    examples: Floats | None,
    *,
    as_json: bool,
) -> None:
    """Returns nothing; writes the program of `model` (sparsified) for a device's state, and tells of it.

    state      a state file of a device, .safetensors
    examples   (n, *shape) real inputs for the proof

    Raises:
        SettingsError: no examples, no state there, or ExecuTorch is missing.
        BundleError: the state is of another model.
        LoweringError: no program can be made, or it is not equal; nothing is written then.
    """
    require_xnnpack()
    if examples is None:
        raise SettingsError("the proof compares with the masked model on real examples: give --data")
    manifest = source_manifest(model, spec, labels)
    proof = write_program(model, manifest, _state(state), out, examples)
    if as_json:
        typer.echo(json.dumps({"program": str(out), "proof": str(proof_path(out)), **proof.to_json()}))
    else:
        typer.echo(_told(proof, out))


def _told(proof: Proof, out: Path) -> str:
    layers = [f"  {layer.layer}: {layer.total} => {layer.kept}  {layer.reason}" for layer in proof.layers]
    whole, small = proof.masked, proof.compact
    return "\n".join(
        [
            *layers,
            f"{out}: {small.bytes:,} bytes instead of {whole.bytes:,}, {small.latency_median_ms} ms instead of "
            f"{whole.latency_median_ms}; differs from the masked model by {proof.relative_difference:.1e} of its "
            f"largest logit, same label on {proof.argmax_agreement:.0%} of {proof.examples} examples",
        ]
    )


def _state(path: Path) -> dict[str, Floats]:
    """Returns the state tensors of a device's state file, without the thresholds it has caught up to."""
    if not path.is_file():
        raise SettingsError(f"no state at {path}: expected a device's state-N.safetensors")
    try:
        tensors = safetensors.numpy.load_file(path)
    except (SafetensorError, OSError, KeyError) as error:  # KeyError: a dtype numpy does not have
        raise SettingsError(f"{path} is not a safetensors file: {error}") from error
    return {name: np.asarray(value) for name, value in tensors.items() if name != BASE}


def _token(given: str | None, file: Path | None) -> Secret | None:
    if file is not None:
        try:
            given = file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"cannot read the token from {file}: {error}") from error
        if not given:
            raise SettingsError(f"{file} holds no token")
    return Secret(given) if given else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --port or --host"
        ) from error


def _exit(*_: object) -> None:
    raise SystemExit(0)
