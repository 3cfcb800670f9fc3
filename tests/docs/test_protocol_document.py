"""PROTOCOL.md and the code say the same: every request, role, problem, event and limit, in both directions."""

import importlib
import re
from collections.abc import Iterator
from dataclasses import fields
from http import HTTPStatus
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from server_api import errors, problems
from server_api.app import create_app
from server_api.settings import Settings
from spafl.layout import Layer, ThresholdLayout
from spafl.protocol import EventKind, Metrics
from spafl.wire import Thresholds, encode_thresholds, max_body_bytes

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "PROTOCOL.md").read_text()


def rows(heading: str) -> Iterator[list[str]]:
    """The cells of the rows of the first table under `## heading`."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    assert section, heading
    lines = [line for line in section[1].splitlines() if line.startswith("|")]
    for line in lines[2:]:
        yield [cell.strip() for cell in line.strip("|").split("|")]


@pytest.fixture(scope="module")
def openapi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return create_app(Settings(data=tmp_path_factory.mktemp("server"))).openapi()


def operations(openapi: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in openapi["paths"].items()
        for method, operation in methods.items()
    }


def test_every_request_stands_in_the_document_with_its_role(openapi: dict[str, Any]) -> None:
    documented = {request.strip("`"): role for request, role, _ in rows("Requests")}
    assert documented.pop("GET /v1/openapi.json") == "anyone"  # describes the others, not itself
    actual = {
        request: ", ".join(sorted(name for scheme in operation.get("security", []) for name in scheme))
        or "anyone"
        for request, operation in operations(openapi).items()
    }
    assert documented == actual


def test_every_success_status_stands_in_its_row(openapi: dict[str, Any]) -> None:
    for request, _, answers in rows("Requests"):
        operation = operations(openapi).get(request.strip("`"), {"responses": {}})
        for status in operation["responses"]:
            assert status == "default" or status in answers, f"{request} answers {status}"


def test_every_query_parameter_stands_in_the_document(openapi: dict[str, Any]) -> None:
    for request, operation in operations(openapi).items():
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "query":
                assert f"?{parameter['name']}=" in TEXT, f"{request} takes {parameter['name']}"


def leaves(kind: type[errors.Refusal]) -> list[type[errors.Refusal]]:
    below = kind.__subclasses__()
    return [leaf for child in below for leaf in leaves(child)] if below else [kind]


def test_every_problem_stands_in_the_document_with_its_status() -> None:
    documented = {word.strip("`"): (statuses, again) for word, statuses, again, _ in rows("Problems")}
    # what no Refusal stands for: the framework's own refusals, and defects
    for word in set(re.findall(r'problem_response\(\s*"([a-z-]+)"', Path(problems.__file__).read_text())):
        assert word in documented
        del documented[word]
    wrong_method = HTTPStatus.METHOD_NOT_ALLOWED
    assert documented.pop(wrong_method.phrase.lower().replace(" ", "-")) == (str(wrong_method.value), "")
    assert documented == {
        leaf.word: (str(leaf.status), "R" if leaf.again_later else "") for leaf in leaves(errors.Refusal)
    }


def test_every_event_stands_in_the_document() -> None:
    assert [kind.strip("`") for kind, _ in rows("Events")] == list(get_args(EventKind))


@pytest.mark.parametrize(("limit", "value", "place"), list(rows("Limits")))
def test_every_limit_is_the_codes(limit: str, value: str, place: str) -> None:
    module, _, name = place.strip("`").rpartition(".")
    assert float(value.replace(",", "")) == getattr(importlib.import_module(module), name), limit


def test_no_limit_of_the_contract_is_left_out() -> None:
    named = {place.strip("`") for *_, place in rows("Limits")}
    for module in ("spafl.wire", "spafl.layout", "spafl.manifest"):
        limits = {name for name in vars(importlib.import_module(module)) if re.match(r"(MAX|MIN)_", name)}
        defined = set(
            re.findall(
                r"^(M[A-Z_]+)(?:, (M[A-Z_]+))? =",
                Path(importlib.import_module(module).__file__ or "").read_text(),
                re.M,
            )
        )
        own = {name for pair in defined for name in pair if name} & limits
        assert {f"{module}.{name}" for name in own} <= named


def test_the_formula_for_a_body_is_the_codes() -> None:
    layout = ThresholdLayout.of([Layer("a", "linear", out=570, n_in=1, n_scale=1, offset=0)])
    assert "`8 + 512 + 4 * size` bytes" in TEXT
    assert max_body_bytes(layout) == 8 + 512 + 4 * 570


def test_the_example_body_is_what_the_code_writes() -> None:
    """The layout of tests/golden; its id is quoted."""
    block = re.search(r"^    [0-9a-f]{8} 00000000 .*?\n\n", TEXT, re.M | re.S)
    assert block
    first, *header, values = [line.strip() for line in block[0].strip().splitlines()]
    length = bytes.fromhex(first.split("  ")[0].replace(" ", ""))
    text = "".join(line.split("    ")[0] for line in header)
    hexed = values.split("    ")[0].split("   ")[0].replace(" ", "")
    body = length + text.encode().ljust(int.from_bytes(length, "little")) + bytes.fromhex(hexed)
    layout = ThresholdLayout.of(
        [
            Layer("conv", "conv", out=2, n_in=25, n_scale=25, offset=0),
            Layer("fc", "linear", out=1, n_in=8, n_scale=8, offset=0, scale=0.25),
        ]
    )
    assert body == encode_thresholds(layout, Thresholds(np.array([0.5, -1.25, 3.0]), 41))


def test_every_metric_stands_in_the_document() -> None:
    for name in [field.name for field in fields(Metrics)]:
        assert f"`{name}`" in TEXT


def test_its_links_lead_somewhere() -> None:
    anchors = {
        re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^## (.*)$", TEXT, re.M)
    }
    assert set(re.findall(r"\]\(#([a-z0-9-]+)\)", TEXT)) <= anchors
