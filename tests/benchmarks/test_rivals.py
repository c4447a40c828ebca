# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/rivals.py: the table of kept results, and the network that other tools see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('onnx')

import rivals
import torch
from mmdet.registry import MODELS


def test_rows_join_the_bits_of_a_tool(tmp_path: Path) -> None:
    def write(folder: str, name: str, **content: Any) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / f'{name}.json').write_text(json.dumps(content))

    for bits, ap, seconds in (('w4a8', 0.197, 90), ('w8a8', 0.277, 60)):
        write('rivals', bits, tool='mct-ptq', bits=bits, source='noise', images=64, AP=ap, quantization_seconds=seconds)
    write('deploy', 'calibration_nncf_noise', what='nncf', source='noise', calibration_images=32, AP=0.25,
          quantization_seconds=12)  # fmt: skip
    write('deploy', 'accuracy_w4a8_torch', AP=0.26)
    sony, nncf, ours = rivals.table_rows(tmp_path / 'rivals', tmp_path / 'deploy')
    assert (sony.tool, sony.data, sony.minutes) == ("Sony's MCT", '64 noise', '1.0 to 1.5')
    assert sony.aps == dict(w8a8='27.7', w4a8='19.7')
    assert (nncf.data, nncf.minutes, nncf.aps) == ('32 noise', '0.2', dict(w8a8='25.0'))
    assert ours.aps == dict(w4a8='26.0')


def test_network_returns_the_maps_of_the_head(tiny_cfg: Any) -> None:
    detector = MODELS.build(tiny_cfg('yolov5'))
    detector.init_weights()
    network, images = rivals.RawMaps(detector.eval()).eval(), torch.rand(1, 3, 64, 64)
    traced = torch.fx.symbolic_trace(network)
    (expected,) = detector.bbox_head(detector.extract_feat(images))
    for maps in (network(images), traced(images)):
        for one, other in zip(maps, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_table_of_the_page_is_that_of_the_kept_results(capsys: pytest.CaptureFixture[str]) -> None:
    rivals.update_page(check=True)
