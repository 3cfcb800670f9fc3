"""CIFAR-10 in its binary version: records of one label byte and 3,072 pixel bytes. The pickled version is refused.

Source: A. Krizhevsky, "The CIFAR-10 dataset", binary version (cifar-10-binary.tar.gz).
"""

from pathlib import Path

import numpy as np

from trainer.data.dataset import MAX_BYTES, Dataset, Split
from trainer.errors import DataError

SHAPE = (3, 32, 32)
"""Red, green and blue planes, each row by row: channels already come first."""
RECORD = 1 + 3 * 32 * 32
TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
TEST = "test_batch.bin"
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def is_cifar_folder(folder: Path) -> bool:
    """Returns whether `folder` holds CIFAR-10 batches, binary or pickled."""
    return (folder / TEST).is_file() or (folder / "data_batch_1").is_file()


def load_cifar_folder(folder: Path) -> Split:
    """Returns CIFAR-10 from the batches in `folder`, the test batch as test examples.

    Raises:
        DataError: no training batch, no test batch, a batch that is not whole records of labels 0 to 9, or the
            pickled version, which could run code when read.
    """
    train = [path for name in TRAIN if (path := folder / name).is_file()]
    if not train or not (folder / TEST).is_file():
        raise DataError(
            f"{folder} lacks {TRAIN[0]} or {TEST}: unpack the binary version, cifar-10-binary.tar.gz; "
            "the python version is pickled and never read"
        )
    return Split(_read(train), _read([folder / TEST]))


def _read(paths: list[Path]) -> Dataset:
    for path in paths:
        if (size := path.stat().st_size) % RECORD or not 0 < size <= MAX_BYTES // len(paths):
            raise DataError(f"{path} has {size} bytes, expected whole records of {RECORD}")
    records = np.concatenate([np.fromfile(path, np.uint8).reshape(-1, RECORD) for path in paths])
    return Dataset(records[:, 1:].reshape(-1, *SHAPE), records[:, 0].astype(np.int64), LABELS)
