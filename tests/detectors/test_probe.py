# SPDX-License-Identifier: Apache-2.0
"""One run shows every layer of a detector, whatever its weights propose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import nn

from mmzsq.detectors.probe import probe
from mmzsq.quantization import QuantizationConfig, QuantizationReport, prepare

LAST = {
    'faster-rcnn_r18': {
        'rpn_head.rpn_cls',
        'rpn_head.rpn_reg',
        'roi_head.bbox_head.fc_cls',
        'roi_head.bbox_head.fc_reg',
    }
}
LAST['mask-rcnn_r18'] = LAST['mask-rcnn_swin'] = LAST['faster-rcnn_r18'] | {'roi_head.mask_head.conv_logits'}
FIRST = {
    'faster-rcnn_r18': 'backbone.conv1',
    'mask-rcnn_r18': 'backbone.conv1',
    'mask-rcnn_swin': 'backbone.patch_embed.projection',
}


def _report(detector: nn.Module) -> QuantizationReport:
    config = QuantizationConfig.from_dict(dict(w_bits=4, a_bits=4))
    return prepare(detector, config, run=lambda: probe(detector))


@pytest.mark.parametrize('name', LAST)
def test_every_layer_of_a_two_stage_detector_is_quantized(name: str, tiny_cfg: Callable[[str], Any]) -> None:
    """From the patch embedding to the deconvolution; first and last layers are known as such."""
    report = _report(MODELS.build(tiny_cfg(name)))
    assert {row.name: row.reason for row in report.layers if not row.quantized} == {}
    assert {row.name for row in report.layers if row.role == 'first'} == {FIRST[name]}
    assert {row.name for row in report.layers if row.role == 'last'} == LAST[name]
    assert all(row.macs for row in report.layers)
    assert ('roi_head.mask_head.upsample' in {row.name for row in report.layers}) == name.startswith('mask')


@pytest.mark.parametrize('keep', ['nothing', 'all'])
def test_the_report_does_not_depend_on_what_is_proposed(keep: str, tiny_cfg: Callable[[str], Any]) -> None:
    """A detector that proposes nothing, or as much as it can, is reported as one with other weights."""
    expected = _report(MODELS.build(tiny_cfg('mask-rcnn_r18'))).layers
    cfg = tiny_cfg('mask-rcnn_r18')
    cfg.test_cfg.rpn.min_bbox_size = 10**6 if keep == 'nothing' else -1
    torch.manual_seed(5)
    assert _report(MODELS.build(cfg)).layers == expected


def test_the_detector_is_as_before_afterwards(tiny_cfg: Callable[[str], Any]) -> None:
    detector = MODELS.build(tiny_cfg('faster-rcnn_r18'))
    probe(detector)
    assert 'forward' not in vars(detector.roi_head)
