"""Where examples come from, by name or by path."""

from pathlib import Path

from trainer.data.arrays import load_arrays
from trainer.data.cifar import is_cifar_folder, load_cifar_folder
from trainer.data.dataset import Split, split_off_test
from trainer.data.digits import load_digits
from trainer.data.idx import is_idx_folder, load_idx_folder
from trainer.errors import DataError


def open_dataset(source: str | Path, *, limit: int | None = None, seed: int = 0) -> Split:
    """Returns the examples of `source`, to train on and to test with.

    source  "digits"; a folder of IDX files, of CIFAR-10's binary batches, or of class folders of images; a .zip of
            such class folders; or an .npz
    limit   images of each label to read from class folders
    seed    of the test examples drawn where the source brings none

    Raises:
        DataError: there is no such source, or its content is not what its form promises.
    """
    path = Path(source)
    if source == "digits":
        return split_off_test(load_digits(), seed=seed)
    if not path.exists():
        raise DataError(f"no dataset {str(source)!r}: expected digits, a folder, a .zip of images or an .npz")
    if path.suffix == ".npz":
        return load_arrays(path, seed=seed)
    if path.is_dir() and is_cifar_folder(path):
        return load_cifar_folder(path)
    if path.is_dir() and is_idx_folder(path):
        return load_idx_folder(path)
    if path.is_dir() or path.suffix == ".zip":
        # Pillow is only needed, and only imported, for images
        from trainer.data.images import load_images

        return load_images(path, limit=limit, seed=seed)
    raise DataError(f"{path} is none of: a folder, a .zip of images, an .npz")
