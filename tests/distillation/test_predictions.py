# SPDX-License-Identifier: Apache-2.0
"""The prediction loss chosen for a detector, and its log line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import DENSE, MASKS, MULTI_STAGE, TRANSFORMERS, Family
from harness import zoo_config
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import nn

from mmzsq.distillation import (
    DensePredictionLoss,
    LocationPredictionLoss,
    PredictionKLLoss,
    PredictionLoss,
    TwoStagePredictionLoss,
)
from mmzsq.distillation import predictions as module

STANDARD = ('Faster R-CNN', 'Mask R-CNN', 'Dynamic R-CNN', 'Libra R-CNN', 'PISA')
"""Two-stage detectors with standard heads."""

UNDECODED = ('SABL',)
"""Dense detectors whose boxes are compared before decoding."""


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


LOSSES = {
    'LocationPredictionLoss': (*DENSE, *MASKS),
    'QueryPredictionLoss': TRANSFORMERS,
    'RegionPredictionLoss': [family for family in MULTI_STAGE if family.name not in STANDARD],
    'TwoStagePredictionLoss': [family for family in MULTI_STAGE if family.name in STANDARD],
}


@pytest.mark.parametrize(
    ('family', 'kind'),
    [pytest.param(family, kind, id=family.name) for kind, families in LOSSES.items() for family in families],
)
def test_the_heads_of_the_zoo_are_compared_by_location_query_or_region(
    family: Family, kind: str, log: list[str]
) -> None:
    register_all_modules()
    model = zoo_config(family.config, family.size, family.shrink, family.changes).model
    # The loss depends on classes and settings only. Without weights, a detector is built in no time.
    with torch.device('meta'):
        detector = MODELS.build(model)
    loss = PredictionLoss(loss_weight=3.0).resolve(detector)
    assert type(loss).__name__ == kind and loss.loss_weight == 3.0
    assert loss.taps(detector)
    assert len(log) == (kind != 'TwoStagePredictionLoss')
    if kind == 'LocationPredictionLoss':
        assert type(getattr(detector, loss.taps(detector)[0])).__name__ in log[0]
        assert ('raw values' in log[0]) == (family.name in UNDECODED)


def test_the_log_names_what_is_compared(tiny_cfg: Callable[[str], Any], log: list[str]) -> None:
    detector = MODELS.build(tiny_cfg('retinanet_r18'))
    loss = PredictionLoss().resolve(detector)
    assert isinstance(loss, LocationPredictionLoss) and loss.taps(detector) == ['bbox_head']
    assert log == ['PredictionLoss: RetinaHead: LocationPredictionLoss compares classes and decoded boxes by location']


def test_other_detectors_are_compared_by_raw_maps_and_the_log_gives_the_reason(log: list[str]) -> None:
    detector = nn.Module()
    detector.bbox_head = nn.Conv2d(4, 6, 1)
    loss = PredictionLoss(loss_weight=3.0).resolve(detector)
    assert isinstance(loss, PredictionKLLoss)
    assert (loss.loss_weight, loss.tau) == (pytest.approx(0.3), 4.0)
    assert loss.taps(detector) == ['bbox_head']
    assert 'Module is not a TwoStageDetector' in log[0] and 'PredictionKLLoss' in log[0]
    assert 'boxes are not decoded' in log[0]


def test_a_loss_that_is_named_stays(tiny_cfg: Callable[[str], Any]) -> None:
    loss = PredictionKLLoss()
    assert loss.resolve(MODELS.build(tiny_cfg('mask-rcnn_r18'))) is loss
