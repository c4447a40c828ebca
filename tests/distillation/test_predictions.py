# SPDX-License-Identifier: Apache-2.0
"""The prediction loss chosen for a detector, and its log line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from mmdet.registry import MODELS

from mmzsq.distillation import DensePredictionLoss, PredictionKLLoss, PredictionLoss, TwoStagePredictionLoss
from mmzsq.distillation import predictions as module


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(module, 'print_log', lambda line, logger: lines.append(line))
    return lines


def test_a_head_that_decodes_is_compared_by_location(tiny_cfg: Callable[[str], Any], log: list[str]) -> None:
    detector = MODELS.build(tiny_cfg('yolov5'))
    loss = PredictionLoss(loss_weight=3.0).resolve(detector)
    assert isinstance(loss, DensePredictionLoss) and loss.loss_weight == 3.0
    assert loss.weights == DensePredictionLoss().weights and log == []
    assert repr(loss) == 'DensePredictionLoss(loss_weight=3.0, objectness=1.0, classes=1.0, boxes=1.0)'


@pytest.mark.parametrize('name', ['mask-rcnn_r18', 'mask-rcnn_swin', 'faster-rcnn_r18'])
def test_a_two_stage_detector_is_compared_by_region(tiny_cfg: Callable[[str], Any], name: str, log: list[str]) -> None:
    detector = MODELS.build(tiny_cfg(name))
    loss = PredictionLoss(loss_weight=3.0).resolve(detector)
    assert isinstance(loss, TwoStagePredictionLoss) and loss.loss_weight == 3.0 and log == []
    masks = ['roi_head.mask_head'] if name.startswith('mask') else []
    assert loss.taps(detector) == ['rpn_head', 'roi_head.bbox_head', *masks]


def test_other_detectors_are_compared_by_raw_maps_and_the_log_gives_the_reason(
    tiny_cfg: Callable[[str], Any], log: list[str]
) -> None:
    detector = MODELS.build(tiny_cfg('retinanet_r18'))
    loss = PredictionLoss(loss_weight=3.0).resolve(detector)
    assert isinstance(loss, PredictionKLLoss)
    assert (loss.loss_weight, loss.tau) == (pytest.approx(0.3), 4.0)
    assert loss.taps(detector) == ['bbox_head']
    assert 'RetinaNet is not a TwoStageDetector' in log[0] and 'PredictionKLLoss' in log[0]


def test_a_loss_that_is_named_stays(tiny_cfg: Callable[[str], Any]) -> None:
    loss = PredictionKLLoss()
    assert loss.resolve(MODELS.build(tiny_cfg('mask-rcnn_r18'))) is loss
