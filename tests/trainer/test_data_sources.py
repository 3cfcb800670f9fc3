"""Every form a dataset can come in, read from files made here; damaged ones are refused in words."""

import gzip
import io
import re
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spafl.manifest import InputSpec
from trainer.data import Dataset, input_spec, load_arrays, model_input, open_dataset, save_arrays
from trainer.errors import DataError

DRAW = np.random.default_rng(7)


def idx(values: np.ndarray) -> bytes:
    return bytes((0, 0, 8, values.ndim)) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    for part, n in (("train", 30), ("t10k", 6)):
        images = DRAW.integers(0, 256, (n, 5, 4), np.uint8)
        labels = (np.arange(n) % 3).astype(np.uint8)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    return tmp_path


def test_digits_are_28x28_bytes_split_by_label() -> None:
    split = open_dataset("digits")
    assert split.train.shape == (1, 28, 28)
    assert split.train.x.dtype == np.uint8
    assert len(split.train) + len(split.test) == 1797
    assert split.train.x.max() == 255
    np.testing.assert_allclose(
        split.test.counts() / (split.test.counts() + split.train.counts()), 0.2, atol=0.01
    )
    assert open_dataset("digits").digest() == split.digest()
    assert open_dataset("digits", seed=1).digest() != split.digest()


def test_idx_plain_and_gzipped(mnist: Path) -> None:
    split = open_dataset(mnist)
    assert split.train.x.shape == (30, 1, 5, 4)
    assert split.test.labels == ("0", "1", "2")
    raw = (mnist / "train-images-idx3-ubyte").read_bytes()
    assert split.train.x.tobytes() == raw[16:]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda raw: raw[:-1], "holds only 599"),
        (lambda raw: raw + b"\0", "holds more"),
        (lambda raw: raw[:9], "ends in its header"),
        (lambda raw: b"\0\0\x0d\x03" + raw[4:], "starts with 00000d03"),
        (lambda raw: b"", "starts with nothing"),
        (lambda raw: raw[:4] + struct.pack(">3I", 2**31, 2**31, 2) + raw[16:], "expected at most"),
    ],
)
def test_damaged_idx_is_refused(mnist: Path, damage, words: str) -> None:
    path = mnist / "train-images-idx3-ubyte"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=words):
        open_dataset(mnist)


def test_damaged_or_missing_gzip_is_refused(mnist: Path) -> None:
    path = mnist / "t10k-labels-idx1-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot read"):
        open_dataset(mnist)
    path.unlink()
    with pytest.raises(DataError, match="lacks t10k-labels"):
        open_dataset(mnist)


def cifar_records(labels: list[int]) -> bytes:
    return b"".join(bytes([label]) + DRAW.integers(0, 256, 3072, np.uint8).tobytes() for label in labels)


def test_cifar_binary_keeps_channels_first(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"data_batch_{number}.bin").write_bytes(cifar_records([number, 9]))
    (tmp_path / "test_batch.bin").write_bytes(cifar_records([0]))
    split = open_dataset(tmp_path)
    assert split.train.y.tolist() == [1, 9, 2, 9]
    assert split.test.labels[0] == "airplane"
    raw = (tmp_path / "data_batch_1.bin").read_bytes()
    # the red plane comes first, row by row
    np.testing.assert_array_equal(split.train.x[0, 0, 1], np.frombuffer(raw, np.uint8)[1 + 32 : 1 + 64])


def test_cifar_of_another_size_label_or_pickled_is_refused(tmp_path: Path) -> None:
    (tmp_path / "test_batch.bin").write_bytes(cifar_records([0]))
    with pytest.raises(DataError, match=r"lacks data_batch_1\.bin"):
        open_dataset(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(cifar_records([1])[:-1])
    with pytest.raises(DataError, match="whole records of 3073"):
        open_dataset(tmp_path)
    (tmp_path / "data_batch_1.bin").write_bytes(cifar_records([10]))
    with pytest.raises(DataError, match="labels run from 10 to 10"):
        open_dataset(tmp_path)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def write_images(target: Path, names: dict[str, np.ndarray]) -> Path:
    if target.suffix == ".zip":
        with zipfile.ZipFile(target, "w") as archive:
            for name, pixels in names.items():
                archive.writestr(name, png(pixels))
    else:
        for name, pixels in names.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(png(pixels))
    return target


@pytest.mark.parametrize("form", ["folder", "images.zip"])
def test_class_folders_with_train_and_test(tmp_path: Path, form: str) -> None:
    images = {
        f"{part}/{label}/{number}.png": DRAW.integers(0, 256, (6, 4, 3), np.uint8)
        for part in ("train", "test")
        for label in ("owl", "cat")
        for number in range(3)
    }
    split = open_dataset(write_images(tmp_path / form, images), limit=2)
    assert split.train.labels == ("cat", "owl")
    assert split.train.x.shape == (4, 3, 6, 4)
    np.testing.assert_array_equal(split.train.x[3], images["train/owl/1.png"].transpose(2, 0, 1))
    assert split.test.y.tolist() == [0, 0, 1, 1]


def test_class_folders_alone_are_split_by_label(tmp_path: Path) -> None:
    images = {f"{label}/{n}.png": np.full((4, 4), n, np.uint8) for label in "ab" for n in range(10)}
    split = open_dataset(write_images(tmp_path / "i.zip", images))
    assert split.train.x.shape == (16, 1, 4, 4)
    assert split.test.counts().tolist() == [2, 2]


def test_a_folder_around_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    def images(root: str) -> dict[str, np.ndarray]:
        names = [f"{root}{label}/{n}.png" for label in "ab" for n in range(5)]
        return {
            name: np.full((4, 4), 9, np.uint8) for name in [*names, "__MACOSX/x/a/._0.png", ".git/a/0.png"]
        }

    for number, root in enumerate(("", "photos/", "my/photos/")):
        split = open_dataset(write_images(tmp_path / f"{number}.zip", images(root)))
        assert (len(split.train), len(split.test), split.train.labels) == (8, 2, ("a", "b"))
    both = images("set/train/") | images("set/test/")
    assert len(open_dataset(write_images(tmp_path / "both", both)).test) == 10


def test_what_is_too_large_is_refused_before_it_is_read(tmp_path: Path, monkeypatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((1000, 50), np.float32), y=np.arange(1000))
    monkeypatch.setattr("trainer.data.arrays.MAX_BYTES", 100_000)
    with pytest.raises(DataError, match="unpacks to"):
        open_dataset(tmp_path / "a.npz")
    write_images(tmp_path / "i.zip", {f"{label}/0.png": np.zeros((40, 40), np.uint8) for label in "ab"})
    monkeypatch.setattr("trainer.data.images.MAX_BYTES", 3000)
    with pytest.raises(DataError, match="too many"):
        open_dataset(tmp_path / "i.zip")
    monkeypatch.setattr("trainer.data.images.MAX_FILE_BYTES", 20)
    with pytest.raises(DataError, match="longer than 20 bytes"):
        open_dataset(tmp_path / "i.zip")


def test_unusable_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images below"):
        open_dataset(tmp_path)
    ragged = {"a/0.png": np.zeros((4, 4), np.uint8), "b/0.png": np.zeros((4, 5), np.uint8)}
    with pytest.raises(DataError, match="bring all to one size"):
        open_dataset(write_images(tmp_path / "ragged", ragged))
    with pytest.raises(DataError, match="expected all images as"):
        open_dataset(
            write_images(
                tmp_path / "deep.zip", {name: np.zeros((4, 4), np.uint8) for name in ("x/0.png", "y/z/0.png")}
            )
        )
    broken = write_images(tmp_path / "broken", {"a/0.png": np.zeros((4, 4), np.uint8)})
    (broken / "b").mkdir()
    (broken / "b/0.png").write_bytes(png(np.zeros((4, 4), np.uint8))[:40])
    with pytest.raises(DataError, match=re.escape("b/0.png is")):
        open_dataset(broken)
    (tmp_path / "not.zip").write_bytes(b"PK?")
    with pytest.raises(DataError, match=r"as a \.zip"):
        open_dataset(tmp_path / "not.zip")
    with pytest.raises(DataError, match="no dataset 'nowhere'"):
        open_dataset("nowhere")


def test_arrays_come_back_as_saved(tmp_path: Path) -> None:
    train = Dataset(DRAW.random((8, 5), np.float32), np.arange(8) % 2, ("no", "yes"))
    save_arrays(tmp_path / "a.npz", train, train.take([0, 3]))
    split = load_arrays(tmp_path / "a.npz")
    np.testing.assert_array_equal(split.train.x, train.x)
    np.testing.assert_array_equal(split.test.y, [0, 1])
    assert split.train.labels == ("no", "yes")


def test_arrays_of_others(tmp_path: Path) -> None:
    x, y = DRAW.integers(0, 256, (20, 4, 4), np.uint8), (np.arange(20) % 4).astype(np.uint8)[:, None]
    np.savez(tmp_path / "keras.npz", x_train=x, y_train=y, x_test=x[:4], y_test=y[:4])
    split = open_dataset(tmp_path / "keras.npz")
    assert split.train.shape == (1, 4, 4)
    assert split.train.labels == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": np.zeros((4, 2), np.float32)}, "lacks the arrays"),
        ({"x": np.array([{}, {}]), "y": np.arange(2)}, "plain arrays"),
        ({"x": np.zeros((4, 8, 8, 3), np.uint8), "y": np.arange(4)}, "channels last"),
        ({"x": np.zeros((4, 2, 2), np.int64), "y": np.arange(4)}, "give pixels as uint8, samples of sensors"),
        ({"x": np.full((4, 2), 1 << 25), "y": np.arange(4)}, "models take at most 16777216"),
        ({"x": np.zeros((4, 2), bool), "y": np.arange(4)}, "uint8 or float32"),
        ({"x": np.zeros((4, 2), np.float32), "y": np.zeros(4)}, "integers"),
        ({"x": np.zeros((4, 2), np.float32), "y": np.arange(3)}, "expected 4 labels"),
        ({"x": np.full((4, 2), np.nan, np.float32), "y": np.arange(4)}, "NaN"),
        (
            {"x": np.zeros((4, 2), np.float32), "y": np.arange(4), "x_test": np.zeros((1, 2))},
            "without labels",
        ),
        ({"x": np.zeros((4, 2), np.float32), "y": np.arange(4), "labels": np.array(["a", "b"])}, "0 to 3"),
    ],
)
def test_unusable_arrays_are_refused(tmp_path: Path, arrays, words: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=words):
        open_dataset(tmp_path / "bad.npz")


def test_input_spec_is_the_mean_and_deviation_by_channel() -> None:
    x = DRAW.integers(0, 256, (50, 3, 4, 4), np.uint8)
    x[:, 1] = 0
    x[:, 2] = 9
    spec = input_spec(Dataset(x, np.zeros(50, np.int64), ("a", "b")))
    assert spec.mean == (round(float(x[:, 0].mean() / 255), 6), 0.0, round(9 / 255, 6))
    # a channel that never changes is only centred
    assert spec.std == (round(float(x[:, 0].std() / 255), 6), 1.0, 1.0)
    y = model_input(x, spec)
    assert y.dtype == np.float32
    # six digits of mean and deviation leave this much
    assert abs(y[:, 0].mean()) < 1e-5
    assert abs(y[:, 0].std() - 1) < 1e-5


def test_floats_enter_as_they_are() -> None:
    data = Dataset(DRAW.random((4, 6), np.float32), np.arange(4) % 2, ("a", "b"))
    spec = input_spec(data)
    assert spec.mean == (0.0,) * 6
    np.testing.assert_array_equal(model_input(data.x, spec), data.x)


def test_whole_numbers_of_features_are_numbers(tmp_path: Path) -> None:
    x = DRAW.integers(-300, 4000, (8, 6))
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(8) % 2)
    split = load_arrays(tmp_path / "a.npz")
    assert split.train.x.dtype == np.float32
    both = np.concatenate([split.train.x, split.test.x])
    assert sorted(both.tolist()) == sorted(x.astype(np.float32).tolist())


def test_windows_of_samples_lose_the_axis_that_images_get(tmp_path: Path) -> None:
    x = DRAW.random((20, 9, 12), np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(20) % 2)
    split = load_arrays(tmp_path / "a.npz")
    assert split.train.shape == (1, 9, 12)
    assert split.shaped((9, 12)).train.shape == split.shaped((9, 12)).test.shape == (9, 12)
    assert split.shaped((12, 9)) is split, "these are other axes"
    assert input_spec(split.shaped((9, 12)).train).mean == (0.0,) * 9


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_token_ids_enter_as_they_are(dtype: type) -> None:
    spec = InputSpec(shape=(6,), mean=(0.0,) * 6, std=(1.0,) * 6, ids=200)
    ids = DRAW.integers(0, 200, (4, 6)).astype(dtype)
    entered = model_input(ids, spec)
    assert entered.dtype == np.float32
    np.testing.assert_array_equal(entered, ids)
    for wrong in (np.full_like(ids, 200), ids - np.float32(200), ids + np.float32(0.5)):
        with pytest.raises(DataError, match="expected token ids, whole numbers of 0 to 199"):
            model_input(wrong, spec)
