"""docs/inspect.md names every key of `spafl inspect --json`, and no other."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.inspect_command import inspected

DOCUMENT = (Path(__file__).parents[2] / "docs" / "inspect.md").read_text(encoding="utf-8")
FREE = {
    "engines",
    "reads",
    "operators",
    "delegates",
    "files",
    "producer",
    "options",
    "opset",
    "proof",
    "external_data",
}
"""Keyed by names of the model's, or documented where it is made; those of `engines` are looked at below."""


def documented(kind: str) -> set[str]:
    """The words in backquotes of the part on `kind`: keys among other things."""
    part = DOCUMENT.partition(f'`"kind": "{kind}"`')[2].partition("\n## ")[0]
    return set(re.findall(r"`([a-z_0-9]+)`", part))


def first_column(kind: str) -> set[str]:
    part = DOCUMENT.partition(f'`"kind": "{kind}"`')[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", part, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`([a-z_0-9]+)`", cell)}


def keys(facts: Any, name: str = "") -> set[str]:
    if isinstance(facts, list):
        return set().union(*(keys(item, name) for item in facts)) if facts else set()
    if not isinstance(facts, dict) or name in FREE:
        return set()
    return set(facts).union(*(keys(value, key) for key, value in facts.items())) if facts else set()


@pytest.fixture(scope="module")
def facts(small_bundle_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.ones((2, 3), np.float32), "w")],
    )
    file = tmp_path_factory.mktemp("model") / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), file)
    return {"bundle": inspected(small_bundle_file), "onnx": inspected(file)}


@pytest.mark.parametrize("kind", ["bundle", "onnx"])
def test_every_key_stands_in_the_document_and_no_other(kind: str, facts: dict[str, Any]) -> None:
    used = keys(facts[kind])
    assert len(used) > 15
    assert used - {"kind"} <= documented(kind)
    assert first_column(kind) <= used
    if kind == "bundle":
        assert set(facts[kind]["engines"]["onnx"]) <= documented(kind)


def test_every_key_of_a_program_stands_in_the_document(tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="pip install --no-deps executorch==1.5.1")
    from tests.export.small_program import small_program

    (tmp_path / "m.pte").write_bytes(small_program())
    used = keys(inspected(tmp_path / "m.pte")) - {"kind"}
    assert len(used) > 10
    assert used <= documented("executorch")
    assert first_column("executorch") <= used
