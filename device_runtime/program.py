"""A compact XNNPACK program of this device's model: asked for by its mask, filled with its weights, proven and run.

Who makes the program sees which filters are active and nothing else. It answers with a program whose weights are
holes, and with one that folds a state into what fits them; both run here.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx2
import numpy as np

from device_runtime.client import Client
from device_runtime.engines import executorch_program
from device_runtime.engines.engine import EngineError
from device_runtime.engines.executorch_library import RELEASE
from device_runtime.errors import BadAnswer
from spafl.algorithm import Mask, decided, mask_of
from spafl.bundle import Bundle, check_state
from spafl.errors import SettingsError, WireError
from spafl.layout import Floats
from spafl.program import (
    MASK_MEDIA_TYPE,
    MAX_BODY_BYTES,
    PROGRAM_MEDIA_TYPE,
    TOKEN_VARIABLE,
    HollowProgram,
    decode_program,
    encode_mask,
    mask_digest,
)
from spafl.proof import PROOF, Candidate, Proof, prove
from spafl.secret import Secret

MODEL = "model.pte"
METHOD = "forward"
TIMEOUT = httpx2.Timeout(connect=10.0, read=300.0, write=30.0, pool=10.0)
"""A program takes seconds to make, and others may be before it."""


def service(url: str, token_file: Path | None = None) -> Client:
    """Returns a connection to the program service at `url`; close it, or use it in a `with`.

    token_file   holds the service's token; None: $SPAFL_PROGRAM_TOKEN, or none

    Raises:
        SettingsError: no usable URL, or no token in the file.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if token_file is not None:
        try:
            token = token_file.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"cannot read the token from {token_file}: {error}") from error
        if not token:
            raise SettingsError(f"{token_file} holds no token")
    return Client(url, Secret(token) if token else None, timeout=TIMEOUT)


def ask(client: Client, bundle: Bundle, mask: Mask) -> HollowProgram:
    """Returns the hollow program for `mask` from a program service; the mask's bits are all it is told.

    Raises:
        ServerError: the branch that fits the service's answer, or `Unreachable`.
    """
    path = f"/bundles/{bundle.id}/programs"
    answer = client.request(
        "POST",
        path,
        content=encode_mask(bundle.manifest.layout, mask),
        headers={"Content-Type": MASK_MEDIA_TYPE, "Accept": PROGRAM_MEDIA_TYPE},
        limit=MAX_BODY_BYTES,
    )
    try:
        return decode_program(answer)
    except WireError as error:
        raise BadAnswer(f"POST {path}: {error}") from error


def fill(bundle: Bundle, state: Mapping[str, Floats], mask: Mask, program: HollowProgram) -> bytes:
    """Returns the whole .pte file: `program`, asked for with `mask`, with the weights of `state` in its holes.

    Raises:
        BadAnswer: the program is of another bundle, mask or release, or does not fit together.
        EngineError: ExecuTorch refuses the program that folds.
    """
    header, layout = program.header, bundle.manifest.layout
    told = (header.bundle, header.layout, header.mask)
    if told != (bundle.id, layout.id, mask_digest(encode_mask(layout, mask))):
        raise BadAnswer(f"got a program of bundle {header.bundle[:12]} or of another mask than was asked for")
    if header.executorch != RELEASE:
        raise BadAnswer(
            f"the program was made by ExecuTorch {header.executorch}, this device runs {RELEASE}: ask a service "
            "with the same release"
        )
    if unknown := sorted(set(header.inputs) - set(state)):
        raise BadAnswer(f"the program wants tensors this model does not have: {unknown[:5]}")
    weights = executorch_program.open_program(program.fold).run(
        METHOD, [np.ascontiguousarray(state[name]) for name in header.inputs]
    )
    try:
        return program.filled(weights)
    except WireError as error:
        raise BadAnswer(str(error)) from error


def compact(
    bundle: Bundle,
    state: Mapping[str, Floats],
    out: Path,
    examples: Floats,
    client: Client,
    *,
    threads: int = 1,
    runs: int = 200,
) -> Proof:
    """Returns the proof for the compact program written to `out`/model.pte, with the proof as `out`/proof.json.

    examples  (n, *shape) float32, n >= 1: real inputs to compare with the masked model; at most the first 512 are used
    client    of a program service
    runs      of each model for its latency

    Raises:
        BundleError: the state is not one of this bundle's model.
        EngineError: no examples, or the program differs from the masked model; nothing is left in `out` then.
        ServerError: no program, or not the one asked for.
    """
    manifest = bundle.manifest
    check_state(manifest, state)
    if len(examples) == 0:
        raise EngineError("a proof needs at least one real example, got none: give --data")
    executorch_program.require()
    mask = mask_of(manifest.layout, state)
    masked = _masked(bundle, decided(manifest.layout, state, mask), threads)
    model = fill(bundle, state, mask, ask(client, bundle, mask))
    program = Program(model, threads)
    proof = prove(
        manifest,
        mask,
        examples,
        masked=masked,
        compact=Candidate(program.logits, program.once, len(model)),
        runtime=f"executorch {RELEASE}",
        bundle=bundle.id,
        threads=threads,
        runs=runs,
    )
    if not proof.equal:
        raise EngineError(proof.refusal())
    out.mkdir(parents=True, exist_ok=True)
    part, told = out / f"{MODEL}.part", out / f"{PROOF}.part"
    try:
        told.write_text(proof.to_text(indent=2) + "\n")
        part.write_bytes(model)
        told.replace(out / PROOF)
        part.replace(out / MODEL)
    finally:
        for left in (part, told):
            left.unlink(missing_ok=True)
    return proof


def predict(model: Path, x: Floats, *, threads: int = 1) -> Floats:
    """Returns logits (n, labels) of a compact program's file for x (n, *shape) float32.

    Raises:
        EngineError: no program there, or ExecuTorch refuses it.
    """
    if not model.is_file():
        raise EngineError(f"no model at {model}: make one with `spafl device compact --programs URL`")
    return Program(model.read_bytes(), threads).logits(x)


class Program:
    """A compact program, opened: x (n, *shape) float32 -> logits (n, labels).

    tensors   what it takes besides examples: none if its weights are inside
    """

    def __init__(self, model: bytes, threads: int, tensors: Sequence[Floats] = ()) -> None:
        self._program = executorch_program.open_program(model, threads=threads)
        self._tensors = tensors
        self._most = self._program.largest(METHOD, 0)[0]

    def once(self, x: Floats) -> Floats:
        """Returns the logits of as many examples as the program takes at once."""
        return self._program.run(METHOD, [x, *self._tensors])[0]

    def logits(self, x: Floats) -> Floats:
        """Returns the logits of any number of examples, n >= 1."""
        x = np.ascontiguousarray(x, np.float32)
        return np.concatenate([self.once(x[at : at + self._most]) for at in range(0, len(x), self._most)])


def _masked(bundle: Bundle, state: Mapping[str, Floats], threads: int) -> Candidate:
    """Returns the masked model, whole: by ExecuTorch if the bundle has its program, else by onnxruntime."""
    engines = bundle.manifest.engines
    tensors = [np.ascontiguousarray(state[tensor.name]) for tensor in bundle.manifest.state]
    weights = sum(tensor.nbytes for tensor in tensors)
    if "executorch" in engines:
        evaluate = bundle.read(engines["executorch"].files["evaluate"])
        program = Program(evaluate, threads, tensors)
        return Candidate(program.logits, program.once, len(evaluate) + weights)
    from device_runtime.engines.onnx import logits, options, session, supply_state

    graph = bundle.read(engines["onnx"].files["masked"])
    chosen = options(threads, spinning=False)
    held = supply_state(chosen, state)
    model = session(graph, chosen)

    def once(x: Floats) -> tuple[object, object]:
        return model.run(["logits"], {"x": x}), held  # held as long as this function: the session reads it

    return Candidate(lambda x: logits(model, x), once, len(graph) + weights)
