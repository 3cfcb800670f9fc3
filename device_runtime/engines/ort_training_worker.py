"""The process that trains with ONNX Runtime Training, in the environment that has it; `ort_training.py` starts it.

python ort_training_worker.py PARENT, the id of the process it works for

Imports the standard library, numpy and that onnxruntime, nothing of this project: its file is started as it is.

A frame is 4 bytes with the header's length and 8 with the body's, little-endian, then the header, a JSON object, then
the body. Requests come on standard input, each is answered by one frame on standard output: {"error": text} if it
failed. Floats are float32 and labels int64, in the machine's order of bytes. "parameters" are the training model's:
the state, then the momenta, one after the other.

    do        header                      body           answer
    open      folder, threads, spinning                  parameters: how many numbers they are
    load                                  parameters
    step      shape of x, scalars         x, y           loss, correct
    tensors                                              body: parameters
    predict   shape of x, batch           parameters, x  labels; body: logits
"""

import json
import os
import signal
import struct
import sys
import threading
import time
import types
from typing import IO, Any

import numpy as np

FRAME = struct.Struct("<IQ")
MAX_HEADER = 1 << 20
MAX_BODY = 1 << 31
"""Bytes. A frame that claims more is not one of ours."""
ORPHAN_SECONDS = 1.0


def write_frame(stream: IO[bytes], header: dict[str, Any], *body: Any) -> None:
    """Returns nothing; header and body, one or more buffers, are sent.

    Raises:
        ValueError: more than a frame may hold; nothing was sent.
    """
    text = json.dumps(header).encode()
    parts = [memoryview(part).cast("B") for part in body if memoryview(part).nbytes]
    sizes = _allowed(len(text), sum(part.nbytes for part in parts))
    stream.write(FRAME.pack(*sizes))
    stream.write(text)
    for part in parts:
        stream.write(part)
    stream.flush()


def read_frame(stream: IO[bytes]) -> tuple[dict[str, Any], bytearray]:
    """Returns the next frame's header and body.

    Raises:
        EOFError: the other side closed the stream, or died in the middle of a frame.
        ValueError: no frame, or one larger than allowed.
    """
    header_size, body_size = _allowed(*FRAME.unpack(_exactly(stream, FRAME.size)))
    header = json.loads(_exactly(stream, header_size))
    if not isinstance(header, dict):
        raise ValueError("a frame without a JSON object as its header")
    return header, _exactly(stream, body_size)


def _allowed(header: int, body: int) -> tuple[int, int]:
    if header > MAX_HEADER or body > MAX_BODY:
        raise ValueError(f"a frame of {header} + {body} bytes; at most {MAX_HEADER} + {MAX_BODY} are allowed")
    return header, body


def _exactly(stream: IO[bytes], size: int) -> bytearray:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        count = stream.readinto(view[at:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the other side closed the stream")
        at += count
    return data


class Worker:
    """The artifacts of one bundle, loaded, and what is asked of them: a method for each request."""

    def open(self, header: dict[str, Any], body: bytearray) -> tuple[dict[str, Any], Any]:
        """Returns how many numbers the parameters are; the artifacts in `folder` are loaded and not needed again."""
        import onnxruntime

        # its __init__ imports torch; registered as a bare package, its parts can be imported without
        package = types.ModuleType("onnxruntime.training")
        package.__path__ = [f"{directory}/training" for directory in onnxruntime.__path__]
        sys.modules["onnxruntime.training"] = package
        from onnxruntime.training.api import CheckpointState, Module, Optimizer

        onnxruntime.set_default_logger_severity(3)
        self._runtime = onnxruntime
        options = self._options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = header["threads"]
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.intra_op.allow_spinning", "1" if header["spinning"] else "0"
        )
        folder = header["folder"]
        # kept: the module reads it, and does not own it
        self._state = CheckpointState.load_checkpoint(f"{folder}/checkpoint")
        self._module = Module(f"{folder}/training_model.onnx", self._state, session_options=options)
        self._optimizer = Optimizer(f"{folder}/optimizer_model.onnx", self._module)
        self._optimizer.set_learning_rate(1.0)  # what it takes off is the whole change
        with open(f"{folder}/eval_model.onnx", "rb") as file:  # noqa: PTH123
            self._eval_model = file.read()
        self._inputs = self._module.input_names()
        self._outputs = self._module.output_names()
        return {"parameters": self._module.get_parameters_size(trainable_only=False)}, b""

    def load(self, header: dict[str, Any], body: bytearray) -> tuple[dict[str, Any], Any]:
        """Returns nothing; the next step starts from the parameters in `body`."""
        buffer = self._runtime.OrtValue.ortvalue_from_numpy(np.frombuffer(body, np.float32))
        self._module.copy_buffer_to_parameters(buffer._ortvalue, trainable_only=False)
        return {}, b""

    def step(self, header: dict[str, Any], body: bytearray) -> tuple[dict[str, Any], Any]:
        """Returns the batch's mean task loss before the step, and how many examples were classified rightly."""
        shape = header["shape"]
        x = np.frombuffer(body, np.float32, int(np.prod(shape))).reshape(shape)
        y = np.frombuffer(body, np.int64, shape[0], x.nbytes)
        available: dict[str, Any] = {"x": x, "y": y}
        available |= {name: np.array(number, np.float32) for name, number in header["scalars"].items()}
        self._module.lazy_reset_grad()  # the changes are written, not added to the last step's
        outputs = self._module.train()(*[available[name] for name in self._inputs])
        self._optimizer.step()
        named = dict(zip(self._outputs, outputs, strict=True))
        return {"loss": float(named["loss"]), "correct": int(named["correct"])}, b""

    def tensors(self, header: dict[str, Any], body: bytearray) -> tuple[dict[str, Any], Any]:
        """Returns the parameters as the last step left them."""
        return {}, self._module.get_contiguous_parameters(trainable_only=False).numpy()

    def predict(self, header: dict[str, Any], body: bytearray) -> tuple[dict[str, Any], Any]:
        """Returns logits for x with the parameters in `body`; training stays where it is."""
        session = self._runtime.InferenceSession(
            self._eval_model, self._options, providers=["CPUExecutionProvider"]
        )
        feeds, at = {}, 0
        for declared in session.get_inputs():
            if declared.name != "x":
                size = int(np.prod(declared.shape))
                feeds[declared.name] = np.frombuffer(body, np.float32, size, at).reshape(declared.shape)
                at += 4 * size
        x = np.frombuffer(body, np.float32, -1, at).reshape(header["shape"])
        starts = range(0, max(len(x), 1), header["batch"])
        parts = [session.run(["logits"], {"x": x[i : i + header["batch"]], **feeds})[0] for i in starts]
        logits = np.concatenate(parts)
        return {"labels": logits.shape[1]}, logits


def serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Returns when the other side has closed the stream of requests."""
    worker = Worker()
    actions = {name: getattr(worker, name) for name in ("open", "load", "step", "tensors", "predict")}
    while True:
        try:
            header, body = read_frame(requests)
        except EOFError:
            return
        try:
            answer, out = actions[header["do"]](header, body)
        except Exception as error:  # the runtime's own errors share no base class
            # its messages begin with the place in its source and the signature there
            text = " ".join(str(error).rpartition("[ONNXRuntimeError] : ")[2].split())
            answer, out = {"error": f"{type(error).__name__}: {text}"[:2000]}, b""
        write_frame(answers, answer, out)


def _leave_with(parent: int) -> None:
    """Ends the process when `parent` has: a stream it left open elsewhere would keep this one waiting."""
    while os.getppid() == parent:
        time.sleep(ORPHAN_SECONDS)
    os._exit(0)


def main() -> None:
    """Returns when the process that started this one is done with it."""
    # Ctrl-C and a service manager's stop reach the whole group: the parent saves what is here, then closes the stream
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # what the runtime prints must not come between frames
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    threading.Thread(target=_leave_with, args=(int(sys.argv[1]),), daemon=True).start()
    serve(sys.stdin.buffer, answers)


if __name__ == "__main__":
    main()
