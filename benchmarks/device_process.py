"""What a device process costs: seconds to import and load, peak memory after 20 training steps. No torch in it.

python benchmarks/device_process.py BUNDLE BATCH_SIZE [ENGINE]      prints one JSON object

peak_rss_mb counts this process and those it started: an engine may work in one of its own.
"""

import json
import sys
import time
from pathlib import Path

started = time.perf_counter()

import numpy as np  # noqa: E402 - importing is what is measured

from device_runtime.engines import open_engine  # noqa: E402
from spafl.bundle import Bundle  # noqa: E402
from spafl.hyperparameters import Hyperparameters  # noqa: E402


def peak_rss_kib(process: str = "self") -> int:
    """Returns the largest resident set so far. Not getrusage's: that starts with the parent's, before exec."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def processes() -> list[str]:
    """Returns this process and those it started that still run."""
    children = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    return ["self", *(child for some in children for child in some)]


def main() -> None:
    """Prints the figures of this process."""
    bundle = Bundle.open(sys.argv[1])
    engine = open_engine(sys.argv[3] if len(sys.argv) > 3 else "onnx", bundle)
    state, draw = bundle.initial_state(), np.random.default_rng(0)
    thresholds = bundle.manifest.layout.join(state)
    engine.begin_round(state, thresholds, thresholds)  # opens the sessions
    del state  # as a device does: the engine has its own now
    loaded = time.perf_counter() - started
    size = int(sys.argv[2])
    for _ in range(20):
        x = draw.standard_normal((size, *bundle.manifest.input.shape), np.float32)
        engine.step(x, draw.integers(0, len(bundle.manifest.labels), size), Hyperparameters(lr=1e-3))
    rss = sum(map(peak_rss_kib, processes()))
    engine.end_round()
    figures = {
        "seconds_to_first_step": round(loaded, 3),
        "peak_rss_mb": round(rss / 1024, 1),
        "torch_loaded": "torch" in sys.modules,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
