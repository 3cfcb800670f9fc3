import io
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from device_runtime.data import load_data, load_images
from device_runtime.errors import DataError
from device_runtime.examples import Examples
from spafl.bundle import Bundle
from spafl.manifest import InputSpec, Manifest

LABELS = ("cat", "dog", "7")


@pytest.fixture
def grey(bundle: Bundle) -> Manifest:
    spec = InputSpec(shape=(1, 4, 6), mean=(0.5,), std=(0.25,))
    return replace(bundle.manifest, input=spec, labels=LABELS)


@pytest.fixture
def colour(bundle: Bundle) -> Manifest:
    spec = InputSpec(shape=(3, 4, 6), mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 4.0))
    return replace(bundle.manifest, input=spec, labels=LABELS)


@pytest.fixture
def flat(bundle: Bundle) -> Manifest:
    return replace(bundle.manifest, labels=LABELS)


def npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path / "data.npz", **arrays)
    return str(path / "data.npz")


def images(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


def test_bytes_are_scaled_as_the_bundle_says(colour: Manifest) -> None:
    x = images(2, 3, 4, 6)
    scaled = Examples(x, np.zeros(2, np.int64)).inputs(colour.input)
    assert scaled.dtype == np.float32
    for channel, (mean, std) in enumerate(zip(colour.input.mean, colour.input.std, strict=True)):
        np.testing.assert_allclose(
            scaled[:, channel], (x[:, channel] / 255 - mean) / std, rtol=1e-5, atol=1e-7
        )


def test_floats_are_taken_as_they_are(grey: Manifest, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(size=(3, 1, 4, 6))
    data = load_data(npz(tmp_path, x=x, y=np.array([0, 1, 2])), grey, validation=0)
    assert np.array_equal(data.train.inputs(grey.input), x.astype(np.float32))


@pytest.mark.parametrize("shape", [(1, 4, 6), (4, 6), (4, 6, 1), (24,)])
def test_grey_arrays_of_any_arrangement(grey: Manifest, tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = images(5, 24)
    data = load_data(npz(tmp_path, x=x.reshape(5, *shape), y=np.zeros(5, int)), grey, validation=0)
    assert np.array_equal(data.train.x, x.reshape(5, 1, 4, 6))


def test_channels_last_arrays_are_turned(colour: Manifest, tmp_path: Path) -> None:
    x = images(5, 4, 6, 3)
    data = load_data(npz(tmp_path, x=x, y=np.zeros(5, int)), colour, validation=0)
    assert np.array_equal(data.train.x, x.transpose(0, 3, 1, 2))


def test_other_sizes_and_colours_are_made_to_fit(grey: Manifest, colour: Manifest, tmp_path: Path) -> None:
    flat_grey = np.full((2, 8, 8), 90, np.uint8)
    as_rgb = load_data(npz(tmp_path, x=flat_grey, y=np.zeros(2, int)), colour, validation=0).train.x
    assert as_rgb.shape == (2, 3, 4, 6)
    assert (as_rgb == 90).all()
    red = np.zeros((2, 3, 9, 9), np.uint8)
    red[:, 0] = 255
    as_grey = load_data(npz(tmp_path, x=red, y=np.zeros(2, int)), grey, validation=0).train.x
    assert as_grey.shape == (2, 1, 4, 6)
    assert (as_grey == 76).all()  # 0.299 * 255, ITU-R BT.601


def test_integers_of_other_types_are_bytes(grey: Manifest, tmp_path: Path) -> None:
    x = images(3, 4, 6)
    data = load_data(npz(tmp_path, x=x.astype(np.int64), y=np.zeros(3, int)), grey, validation=0)
    assert data.train.x.dtype == np.uint8
    with pytest.raises(DataError, match="expected bytes 0 to 255"):
        load_data(npz(tmp_path, x=x.astype(np.int64) + 200, y=np.zeros(3, int)), grey)


def test_labels_are_names_or_indices_and_names_win(grey: Manifest, tmp_path: Path) -> None:
    x = images(3, 4, 6)
    by_name = load_data(npz(tmp_path, x=x, y=np.array(["7", "cat", "1"])), grey, validation=0)
    assert by_name.train.y.tolist() == [2, 0, 1]
    by_index = load_data(npz(tmp_path, x=x, y=np.array([2, 0, 1], np.uint8)), grey, validation=0)
    assert by_index.train.y.tolist() == [2, 0, 1]


def test_a_source_may_say_what_is_held_out(grey: Manifest, tmp_path: Path) -> None:
    x, y = images(5, 4, 6), np.zeros(5, int)
    data = load_data(npz(tmp_path, x=x, y=y, x_val=x[:2], y_val=y[:2]), grey, validation=0.5)
    assert (len(data.train), len(data.validation)) == (5, 2)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"x": images(3, 4, 6)}, r"holds \['x'\]: expected x and y"),
        ({"x": images(3, 4, 6), "y": np.zeros(3, int), "x_val": images(1, 4, 6)}, "x_val and y_val"),
        ({"x": images(3, 4, 6), "y": np.zeros(2, int)}, r"x \(3, 4, 6\) and y \(2,\)"),
        ({"x": images(3, 4, 6), "y": np.array([0, 1, 3])}, "labels of 0 to 3, the model has 0 to 2"),
        ({"x": images(3, 4, 6), "y": np.array(["cat", "cow", "dog"])}, r"labels \['cow'\] are unknown"),
        ({"x": images(3, 4, 6), "y": np.array([0.0, 1.0, 2.0])}, "labels of dtype float64"),
        ({"x": np.zeros((3, 7)), "y": np.zeros(3, int)}, r"shape \(7,\), the model takes \(1, 4, 6\)"),
        ({"x": np.full((3, 4, 6), np.nan), "y": np.zeros(3, int)}, "NaN"),
        ({"x": np.full((3, 4, 6), 255.0), "y": np.zeros(3, int)}, "not scaled: give them as bytes"),
        ({"x": np.array([["a"] * 24] * 3), "y": np.zeros(3, int)}, "dtype <U1"),
        ({"x": images(0, 4, 6), "y": np.zeros(0, int)}, "no examples to train on"),
    ],
)
def test_arrays_that_do_not_fit_are_refused_in_words(
    grey: Manifest, tmp_path: Path, arrays: dict[str, np.ndarray], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        load_data(npz(tmp_path, **arrays), grey)


def test_nothing_is_unpickled(grey: Manifest, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.write_text, (tmp_path / "sprung", "!"))  # type: ignore[return-value]

    source = npz(tmp_path, x=np.array([Trap()], dtype=object), y=np.zeros(1, int))
    with pytest.raises(DataError, match="plain arrays"):
        load_data(source, grey)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not quite", b"\x80\x04K\x01."])
def test_files_that_are_no_npz_are_refused_in_words(grey: Manifest, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*data\.npz"):
        load_data(str(tmp_path / "data.npz"), grey)


def folder(path: Path, names: list[str], size: tuple[int, int] = (9, 5), mode: str = "RGB") -> Path:
    for number, name in enumerate(names):
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size, 40 * number if mode == "L" else (40 * number,) * 3).save(file)
    return path


def packed(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for number, name in enumerate(names):
            content = io.BytesIO()
            Image.new("RGB", (9, 5), (40 * number,) * 3).save(content, "PNG")
            archive.writestr(name, content.getvalue())
        archive.writestr("README.txt", "not an image")
        archive.writestr("__MACOSX/cat/1.png", "resource fork")
    return path


@pytest.mark.parametrize("pack", [False, True])
def test_class_folders(colour: Manifest, tmp_path: Path, pack: bool) -> None:
    names = ["cat/1.png", "cat/2.png", "dog/1.png"]
    source = packed(tmp_path / "a.zip", names) if pack else folder(tmp_path / "a", names)
    data = load_data(str(source), colour, validation=0)
    assert data.train.x.shape == (3, 3, 4, 6)
    assert data.train.x[:, 0, 0, 0].tolist() == [0, 40, 80]
    assert data.train.y.tolist() == [0, 0, 1]


@pytest.mark.parametrize("pack", [False, True])
def test_class_folders_may_be_split_already(colour: Manifest, tmp_path: Path, pack: bool) -> None:
    names = ["train/cat/1.png", "train/dog/1.png", "test/dog/2.png"]
    source = packed(tmp_path / "a.zip", names) if pack else folder(tmp_path / "a", names)
    data = load_data(str(source), colour, validation=0.9)
    assert (data.train.y.tolist(), data.validation.y.tolist()) == ([0, 1], [1])


def test_images_become_what_the_model_takes(grey: Manifest, tmp_path: Path) -> None:
    Image.new("RGBA", (30, 20), (255, 0, 0, 128)).save(tmp_path / "a.png")
    Image.new("L", (6, 4), 200).save(tmp_path / "b.png")
    pixels = load_images([str(tmp_path / "a.png"), str(tmp_path / "b.png")], grey)
    assert pixels.shape == (2, 1, 4, 6)
    assert (pixels[0] == 76).all()
    assert (pixels[1] == 200).all()


def test_a_photo_is_turned_as_its_camera_says(grey: Manifest, tmp_path: Path) -> None:
    upright = np.zeros((4, 6), np.uint8)
    upright[:, :3] = 255  # the left half is bright
    exif = Image.Exif()
    exif[0x0112] = 8  # as stored, the camera was turned: rotate by 90 degrees counter-clockwise to show
    Image.fromarray(np.rot90(upright, -1)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(load_images([str(tmp_path / "a.png")], grey)[0, 0], upright)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["cow/1.png"], r"labels \['cow'\] are unknown"),
        (["1.png"], "is in no class folder"),
        ([], "no images in class"),
    ],
)
def test_folders_that_do_not_fit_are_refused(
    colour: Manifest, tmp_path: Path, names: list[str], words: str
) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match=words):
        load_data(str(folder(tmp_path / "a", names)), colour)


def test_a_file_that_is_no_image_is_named(colour: Manifest, tmp_path: Path) -> None:
    folder(tmp_path / "a", ["cat/1.png"])
    (tmp_path / "a" / "dog").mkdir()
    (tmp_path / "a" / "dog" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 and no more")
    with pytest.raises(DataError, match=r"broken\.jpg as an image"):
        load_data(str(tmp_path / "a"), colour)


def test_a_bomb_of_an_image_is_refused(
    colour: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    folder(tmp_path / "a", ["cat/1.png"])
    with pytest.raises(DataError, match="cannot read"):
        load_data(str(tmp_path / "a"), colour)


def test_a_table(flat: Manifest, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,label,b,c\n1,dog,2.5,-3\n4,cat,5,6\n")
    data = load_data(str(tmp_path / "t.csv"), flat, validation=0)
    assert data.train.x.tolist() == [[1, 2.5, -3], [4, 5, 6]]
    assert data.train.y.tolist() == [1, 0]


def test_a_table_of_pixels_is_bytes_and_one_of_numbers_is_not(
    grey: Manifest, flat: Manifest, tmp_path: Path
) -> None:
    header = ",".join(["label", *(f"p{i}" for i in range(24))])
    (tmp_path / "p.csv").write_text(f"{header}\ncat,{','.join(map(str, range(24)))}\n")
    assert load_data(str(tmp_path / "p.csv"), grey, validation=0).train.x.dtype == np.uint8
    (tmp_path / "n.csv").write_text("label,age,size,weight\ncat,3,30,5\n")
    assert load_data(str(tmp_path / "n.csv"), flat, validation=0).train.x.dtype == np.float32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected one named 'label'"),
        ("a,b\n1,2\n", r"columns \['a', 'b'\]"),
        ("label,a,b,c\n", "no examples"),
        ("label,a,b,c\ncat,1,2\n", "line 2: 3 fields, expected 4"),
        ("label,a,b,c\ncat,1,two,3\n", "could not convert"),
        ("label,a,b,c\ncat,1,nan,3\n", "NaN"),
        ("label,a,b\ncat,1,2\n", r"shape \(2,\), the model takes \(3,\)"),
    ],
)
def test_tables_that_do_not_fit_are_refused(flat: Manifest, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DataError, match=words):
        load_data(str(tmp_path / "t.csv"), flat)


def test_a_callable(flat: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mysensors.py").write_text(
        "import numpy as np\n"
        "def two(): return np.ones((4, 3)), np.array([0, 1, 2, 0])\n"
        "def four(): return (*two(), np.ones((1, 3)), np.array([1]))\n"
        "def wrong(): return [1, 2]\n"
    )
    monkeypatch.chdir(tmp_path)
    assert len(load_data("mysensors:two", flat, validation=0.25).train) == 3
    assert len(load_data("mysensors:four", flat).validation) == 1
    with pytest.raises(DataError, match="returned list"):
        load_data("mysensors:wrong", flat)
    with pytest.raises(DataError, match="cannot import"):
        load_data("mysensors:none", flat)


@pytest.mark.parametrize("source", ["nowhere", "nowhere.txt", "nowhere/", "a:b:c", ""])
def test_an_unknown_source_is_refused_with_the_choices(
    flat: Manifest, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the current directory, which an empty text would be, looks like class folders."""
    (tmp_path / "label").mkdir()
    (tmp_path / "label" / "picture.png").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="class folders"):
        load_data(source, flat)


@pytest.fixture
def words(bundle: Bundle) -> Manifest:
    spec = InputSpec(shape=(5,), mean=(0.0,) * 5, std=(1.0,) * 5, ids=200)
    return replace(bundle.manifest, input=spec, labels=LABELS)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float64])
def test_token_ids_of_any_type_are_taken_as_they_are(words: Manifest, tmp_path: Path, dtype: type) -> None:
    ids = np.random.default_rng(0).integers(0, 200, (4, 5)).astype(dtype)
    data = load_data(npz(tmp_path, x=ids, y=np.zeros(4, int)), words, validation=0)
    entered = data.train.inputs(words.input)
    assert entered.dtype == np.float32
    assert np.array_equal(entered, ids)


@pytest.mark.parametrize("wrong", [200, -1, 0.5])
def test_what_is_no_token_id_is_refused(words: Manifest, tmp_path: Path, wrong: float) -> None:
    x = np.full((4, 5), wrong)
    with pytest.raises(DataError, match="expected token ids, whole numbers to 199"):
        load_data(npz(tmp_path, x=x, y=np.zeros(4, int)), words)


@pytest.mark.parametrize("shape", [(3, 9), (1, 3, 9), (3, 9, 1), (27,)])
def test_windows_of_samples(bundle: Bundle, tmp_path: Path, shape: tuple[int, ...]) -> None:
    spec = InputSpec(shape=(3, 9), mean=(0.0,) * 3, std=(1.0,) * 3)
    manifest = replace(bundle.manifest, input=spec, labels=LABELS)
    x = np.random.default_rng(0).integers(-2000, 2000, (4, 27))
    for dtype in (np.int16, np.float32):
        arrays = npz(tmp_path, x=x.reshape(4, *shape).astype(dtype), y=np.zeros(4, int))
        entered = load_data(arrays, manifest, validation=0).train.inputs(spec)
        assert np.array_equal(entered, x.reshape(4, 3, 9)), "samples are numbers, and none of them is scaled"
    with pytest.raises(DataError, match="models take at most 16777216"):
        load_data(npz(tmp_path, x=x.reshape(4, *shape) + (1 << 25), y=np.zeros(4, int)), manifest)
