"""Bytes that may never change within protocol v1 and bundle format 1: clients, databases and journals hold them."""

import numpy as np
import pytest

from spafl.layout import Layer, ThresholdLayout
from spafl.manifest import Manifest
from spafl.wire import Precision, Thresholds, decode_thresholds, encode_thresholds

LAYOUT = ThresholdLayout.of(
    [
        Layer("conv", "conv", out=2, n_in=25, n_scale=25, offset=0),
        Layer("fc", "linear", out=1, n_in=8, n_scale=8, offset=0, scale=0.25),
    ]
)
LAYOUT_ID = "92df5274ab35c3be"
VALUES = np.array([0.5, -1.25, 3.0], np.float32)

BODIES: dict[Precision, str] = {
    "f32": (
        "7c000000000000007b225f5f6d657461646174615f5f223a7b226c61796f7574223a2239326466353237346162333563"
        "336265222c2276657273696f6e223a223431227d2c227468726573686f6c6473223a7b226474797065223a2246333222"
        "2c227368617065223a5b335d2c22646174615f6f666673657473223a5b302c31325d7d7d0000003f0000a0bf00004040"
    ),
    "f16": (
        "7c000000000000007b225f5f6d657461646174615f5f223a7b226c61796f7574223a2239326466353237346162333563"
        "336265222c2276657273696f6e223a223431227d2c227468726573686f6c6473223a7b226474797065223a2246313622"
        "2c227368617065223a5b335d2c22646174615f6f666673657473223a5b302c365d7d7d20003800bd0042"
    ),
}

MANIFEST = (
    '{"compaction":[{"blocks":1,"drops":true,"groups":1,"layer":"conv","live":[["conv"]],"n_in":25,"out":2,"'
    'positions":4,"reads":{},"reason":"followed by fc","width_at":null}],'
    '"engines":{"onnx":{"files":{"infer":"infer.onnx"},"operators":'
    '{"infer":{"Conv":1}},"requires":{"ir_version":"8","opset":"18"}}},"files":{"infer.onnx":{"bytes":3,"sha256":'
    '"abababababababababababababababababababababababababababababababab"}},"format":"spafl-bundl'
    'e","format_version":2,"input":{"ids":null,"mean":[0.1307],"shape":[1,6,6],"std":[1]},"labels":["nein"'
    ',"schön"],"layout":[{"kind":"conv","n_in":25,"n_scale":25,"name":"conv","offset":0,"out":2'
    ',"scale":1},{"kind":"linear","n_in":8,"n_scale":8,"name":"fc","offset":2,"out":1,"scale":0'
    '.25}],"name":"golden","options":{"gate":true,"init_scale":0.5},"producer":{"spafl":"0.1.0"'
    '},"state":[{"layer":"conv","name":"conv.weight","role":"weight","rows":true,"shape":[2,1,5'
    ',5]},{"layer":"conv","name":"conv.threshold","role":"threshold","rows":true,"shape":[2]},{'
    '"layer":"fc","name":"fc.weight","role":"weight","rows":false,"shape":[1,8]},{"layer":"fc",'
    '"name":"fc.threshold","role":"threshold","rows":false,"shape":[1]}],"train_step":{"form":"'
    'rows","reason":"gated"}}'
)
MANIFEST_ID = "45be3975bcfabf43bdd2f01e56450fa7c8434338b6d3e960b719dadc13e2214e"


def test_layout_id() -> None:
    assert LAYOUT.id == LAYOUT_ID


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_body(precision: Precision) -> None:
    golden = bytes.fromhex(BODIES[precision])
    assert encode_thresholds(LAYOUT, Thresholds(VALUES, 41), precision) == golden
    read = decode_thresholds(LAYOUT, golden)
    assert read.version == 41
    np.testing.assert_array_equal(read.values, VALUES)  # all three are exact in f16


def test_manifest() -> None:
    manifest = Manifest.from_bytes(MANIFEST.encode())
    assert manifest.to_bytes() == MANIFEST.encode()
    assert manifest.id == MANIFEST_ID
    assert manifest.layout == LAYOUT
