"""A manifest is whole, consistent and spelled one way, or it is refused with the place that is wrong."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from spafl.canonical import canonical_json
from spafl.errors import BundleError
from spafl.manifest import (
    MAX_BUNDLE_BYTES,
    MAX_FILE_BYTES,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    Manifest,
    safe_file_name,
)
from spafl.record import RecordError

ENTRY = {"bytes": 1, "sha256": "0" * 64}


def damaged(manifest: Manifest, change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(manifest.to_bytes())
    change(document)
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def test_round_trip(manifest: Manifest) -> None:
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


def test_id_is_the_hash_of_the_file_itself(manifest: Manifest) -> None:
    assert manifest.id == hashlib.sha256(manifest.to_bytes()).hexdigest()


def test_another_spelling_of_the_same_manifest_is_refused(manifest: Manifest) -> None:
    document = json.loads(manifest.to_bytes())
    for data in (
        json.dumps(document, indent=1).encode(),
        manifest.to_bytes() + b"\n",
        b" " + manifest.to_bytes(),
    ):
        with pytest.raises(BundleError, match="canonical"):
            Manifest.from_bytes(data)
    twice = manifest.to_bytes().replace(b'"name":"tiny"', b'"name":"other","name":"tiny"')
    with pytest.raises(BundleError):
        Manifest.from_bytes(twice)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: d.update(format="other"), "format"),
        (lambda d: d.update(format_version=1), "format_version"),
        (lambda d: d.update(name="../tiny"), "name"),
        (lambda d: d.update(name=""), "name"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.pop("layout"), "layout"),
        (lambda d: d.update(layout=[]), "masked layers"),
        (lambda d: d.update(layout={"a": 1}), "wrong fields"),
        (lambda d: d["layout"][0].update(out=True), "whole|1 to"),
        (lambda d: d["layout"][0].update(out=4.5), "1 to"),
        (lambda d: d["layout"][1].update(offset=0), "expected 4"),
        (lambda d: d["layout"][0].update(scale=0), "scale"),
        (lambda d: d["state"].pop(0), "conv"),
        (lambda d: d["state"].append(d["state"][0]), "repeat"),
        (lambda d: d["state"][0].update(shape=[]), "conv"),
        (lambda d: d["state"][0].update(shape=[4, 1, 3, 2]), "9 weights per filter"),
        (lambda d: d["state"][0].update(shape=[4, 1, -3, -3]), "expected at least 1"),
        (lambda d: d["state"][0].update(shape=[4] * 9), "at most 8"),
        (lambda d: d["state"][1].update(shape=[4, 1]), "conv"),
        (lambda d: d["state"][0].update(role="bias"), "role"),
        (lambda d: d["input"].update(shape=[]), "positive sizes"),
        (lambda d: d["input"].update(shape=[0, 8]), "positive sizes"),
        (lambda d: d["input"].update(mean=[]), "1 means"),
        (lambda d: d["input"].update(std=[0]), "positive deviations"),
        (lambda d: d.update(labels=["one"]), "labels"),
        (lambda d: d["options"].update(rate=1e-9), "no canonical spelling"),
        (lambda d: d["options"].update(rate=1e16), "no canonical spelling"),
        (lambda d: d["files"].update({"../escape": ENTRY}), "not a safe file name"),
        (lambda d: d["files"].update({"a": {**ENTRY, "bytes": -1}}), "bytes"),
        (lambda d: d["files"].update({"a": {**ENTRY, "bytes": MAX_FILE_BYTES + 1}}), "bytes"),
        (lambda d: d["files"].update({"a": {**ENTRY, "sha256": "0" * 63}}), "sha256"),
        (lambda d: d["files"].update({"a": {**ENTRY, "sha256": "A" * 64}}), "sha256"),
        (lambda d: d["files"].update({f"f{i}": ENTRY for i in range(MAX_FILES + 1)}), "files"),
        (
            lambda d: d["files"].update({f"f{i}": {**ENTRY, "bytes": MAX_FILE_BYTES} for i in range(3)}),
            "bytes of files",
        ),
        (lambda d: d["files"].update({"a": ENTRY, "a/b": ENTRY}), "both files and folders"),
        (
            lambda d: d["engines"].update(
                onnx={
                    "files": {"infer": "infer.onnx"},
                    "requires": {"opset": "18", "ir_version": "8"},
                    "operators": {},
                }
            ),
            "engine files are not in the bundle",
        ),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(
    manifest: Manifest, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    with pytest.raises(BundleError, match=text):
        Manifest.from_bytes(damaged(manifest, change))


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"{" * 100_000, b'"' + b"a" * 1000 + b'"']
)
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(BundleError, match="not a bundle this version reads"):
        Manifest.from_bytes(data)


def test_size_is_bounded_before_it_is_parsed() -> None:
    with pytest.raises(BundleError, match=str(MAX_MANIFEST_BYTES)):
        Manifest.from_bytes(b" " * (MAX_MANIFEST_BYTES + 1))
    assert MAX_BUNDLE_BYTES >= MAX_FILE_BYTES


@pytest.mark.parametrize("name", ["a", "infer.onnx", "ort_training/optimizer.onnx", "A-b_c.1", "a" * 100])
def test_safe_file_names(name: str) -> None:
    assert safe_file_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        "../a",
        "a/..",
        "a/../b",
        "a/b/c",
        "/a",
        "a/",
        "//a",
        ".hidden",
        "a/.hidden",
        "a..b",
        "a\\b",
        "..\\a",
        "C:a",
        "C:\\a",
        "a\n",
        "a\0",
        "a b",
        "ä",
        "\uff0e\uff0e/a",
        "a" * 101,
    ],
)
def test_unsafe_file_names(name: str) -> None:
    with pytest.raises(ValueError, match="not a safe file name"):
        safe_file_name(name)


def test_no_manifest_can_exist_that_has_no_id(manifest: Manifest) -> None:
    with pytest.raises(RecordError, match="canonical"):
        Manifest.from_json({**manifest.to_json(), "options": {"rate": 1e-5}})


def test_a_message_names_the_place(manifest: Manifest) -> None:
    with pytest.raises(BundleError, match=r"state\.0\.role"):
        Manifest.from_bytes(damaged(manifest, lambda d: d["state"][0].update(role="?")))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": 1, "a": [True, None, "ü"]}, '{"a":[true,null,"ü"],"b":1}'),
        ((1.0, -0.0, 0.1, 1e15, 0.0001), "[1,0,0.1,1000000000000000,0.0001]"),
        ({"a": {"c": (), "b": {}}}, '{"a":{"b":{},"c":[]}}'),
        ('"\\\n\x7f', '"\\"\\\\\\n\x7f"'),
    ],
)
def test_canonical_json(value: Any, text: str) -> None:
    assert canonical_json(value) == text.encode()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-5, -1e-5, 1e16, {1: 2}, [{None: 1}]])
def test_what_has_no_canonical_spelling_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="canonical"):
        canonical_json(value)


def test_token_ids_are_written_down_where_there_are_some(manifest: Manifest) -> None:
    assert b'"ids":null' in manifest.to_bytes()
    told = replace(manifest, input=replace(manifest.input, ids=4000))
    assert Manifest.from_bytes(told.to_bytes()).input.ids == 4000
    for ids in (0, 1 << 25):
        with pytest.raises(BundleError):
            Manifest.from_bytes(told.to_bytes().replace(b'"ids":4000', b'"ids":%d' % ids))
