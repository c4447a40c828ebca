# SPDX-License-Identifier: Apache-2.0
"""Heads of a second stage are compared as classes and boxes if they are, and by relative error otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS

from mmzsq.boxes import complete_iou
from mmzsq.distillation import RegionPredictionLoss, TwoStagePredictionLoss
from mmzsq.distillation.divergence import relative_errors
from mmzsq.distillation.features import mean_squared_error
from mmzsq.distillation.recorder import flatten_tensors
from mmzsq.distillation.regions import region_heads, regions_unsupported_reason
from mmzsq.distillation.two_stage import box_head_terms, decode_on_unit_box, two_stage_unsupported_reason
from mmzsq.errors import UserError


def test_every_head_of_each_stage_is_compared(tiny_cfg: Callable[[str], Any]) -> None:
    heads = region_heads(MODELS.build(tiny_cfg('htc_r18')))
    stages = [f'roi_head.{head}.{stage}' for head in ('bbox_head', 'mask_head') for stage in range(3)]
    assert sorted(heads) == sorted([*stages, 'roi_head.semantic_head'])


def test_boxes_are_compared_as_boxes_and_other_outputs_by_their_error(tiny_cfg: Callable[[str], Any]) -> None:
    detector = MODELS.build(tiny_cfg('htc_r18'))
    loss = RegionPredictionLoss(rpn_weight=0.0, class_weight=2.0, box_weight=3.0, other_weight=5.0)
    outputs: dict[str, dict[str, list[torch.Tensor]]] = {'S': {}, 'T': {}}
    for kind in outputs:
        for name in loss.taps(detector):
            if name == 'rpn_head':
                maps = [*(torch.randn(1, 3, 2, 2) for _ in range(5)), *(torch.randn(1, 12, 2, 2) for _ in range(5))]
                outputs[kind][name] = maps
            elif 'bbox_head' in name:
                outputs[kind][name] = [torch.randn(6, 4), 0.1 * torch.randn(6, 4)]
            else:
                outputs[kind][name] = [torch.randn(6, 3, 4, 4), torch.randn(6, 2, 4, 4)]
    expected = torch.zeros(())
    for stage in range(3):
        name = f'roi_head.bbox_head.{stage}'
        coder = detector.roi_head.bbox_head[stage].bbox_coder
        classes, boxes = box_head_terms(outputs['S'][name], outputs['T'][name], coder)
        expected += (2 * classes + 3 * boxes) / 3
    errors = [
        ((s - t) ** 2).mean() / (t**2).mean()
        for name in outputs['T']
        if 'bbox_head' not in name and name != 'rpn_head'
        for s, t in zip(outputs['S'][name], outputs['T'][name], strict=True)
    ]
    assert len(errors) == 8
    expected += 5 * torch.stack(errors).mean()
    torch.testing.assert_close(loss(outputs['S'], outputs['T'], detector), expected)


def test_a_box_head_without_boxes_is_compared_by_its_classes() -> None:
    logits_S, logits_T = torch.randn(5, 4), torch.randn(5, 4)
    classes, boxes = box_head_terms([logits_S], [logits_T], None)
    divergence = torch.nn.functional.kl_div(
        logits_S.log_softmax(1), logits_T.log_softmax(1), reduction='sum', log_target=True
    )
    torch.testing.assert_close(classes, divergence / logits_T.softmax(1)[:, :3].amax(1).sum())
    assert boxes == 0


def test_relative_error_of_zeros_is_one() -> None:
    teacher = torch.tensor([3.0, -4.0])
    errors = [mean_squared_error(student, teacher) for student in (torch.zeros(2), 2 * teacher, teacher)]
    assert relative_errors(errors, [teacher] * 3).tolist() == [1, 1, 0]


def test_an_extra_roi_head_is_compared(tiny_cfg: Callable[[str], Any]) -> None:
    """Mask Scoring and PointRend add one to a standard RoI head."""
    detector = MODELS.build(tiny_cfg('mask-rcnn_r18'))
    assert two_stage_unsupported_reason(detector) is None
    detector.roi_head.mask_iou_head = torch.nn.Linear(2, 2)
    assert two_stage_unsupported_reason(detector) == 'its roi_head also has a mask_iou_head'
    with pytest.raises(UserError, match='mask_iou_head'):
        TwoStagePredictionLoss().taps(detector)
    assert 'roi_head.mask_iou_head' in RegionPredictionLoss().taps(detector)


def test_error_for_a_one_stage_detector_names_an_alternative(tiny_cfg: Callable[[str], Any]) -> None:
    detector = MODELS.build(tiny_cfg('retinanet_r18'))
    assert regions_unsupported_reason(detector) == 'RetinaNet is not a TwoStageDetector'
    with pytest.raises(UserError, match='mmzsq.PredictionLoss'):
        RegionPredictionLoss().taps(detector)


def tiny_head(kind: str, **settings: Any) -> Any:
    sizes = dict(num_classes=1, in_channels=4, fc_out_channels=8, roi_feat_size=2, num_shared_fcs=2)
    losses = dict(loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, reduction='none'))
    return MODELS.build(dict(type=kind, bbox_coder=dict(type='DeltaXYWHBBoxCoder'), **sizes, **losses, **settings))


@pytest.mark.parametrize('refines', [False, True])
def test_each_object_of_a_region_of_crowddet_is_compared(refines: bool) -> None:
    detector = torch.nn.Module()
    detector.roi_head = torch.nn.Module()
    head = detector.roi_head.bbox_head = tiny_head('MultiInstanceBBoxHead', with_refine=refines)
    loss = RegionPredictionLoss(class_weight=2.0, box_weight=3.0)
    name = 'roi_head.bbox_head'
    loss.taps = lambda _: [name]  # type: ignore[method-assign]
    # Two objects per region, each with a background and an object class, in this order.
    outputs_S, outputs_T = (
        [torch.randn(5, 4), 0.1 * torch.randn(5, 8)] * (1 + refines) for _ in range(2)
    )  # fmt: skip
    expected = torch.zeros(())
    for place in range(2):
        (logits_S, deltas_S), (logits_T, deltas_T) = (
            (o[0][:, 2 * place : 2 * place + 2], o[1][:, 4 * place : 4 * place + 4]) for o in (outputs_S, outputs_T)
        )
        score = logits_T.softmax(1)[:, 1]
        divergence = torch.nn.functional.kl_div(
            logits_S.log_softmax(1), logits_T.log_softmax(1), reduction='sum', log_target=True
        )
        ious = complete_iou(*(decode_on_unit_box(head.bbox_coder, deltas) for deltas in (deltas_S, deltas_T)))
        expected += (2 * divergence + 3 * (score * (1 - ious)).sum()) / score.sum().clamp(min=1) / 2
    torch.testing.assert_close(loss({name: outputs_S}, {name: outputs_T}, detector), expected)


def test_buckets_of_sabl_are_compared_by_their_error() -> None:
    head = MODELS.build(
        dict(
            type='SABLHead', num_classes=3, reg_in_channels=8, cls_in_channels=8, cls_out_channels=8,
            reg_offset_out_channels=8, reg_cls_out_channels=8, roi_feat_size=7, reg_feat_up_ratio=2,
            bbox_coder=dict(type='BucketingBBoxCoder', num_buckets=14, scale_factor=1.7),
        )
    )  # fmt: skip
    detector = torch.nn.Module()
    detector.roi_head = torch.nn.Module()
    detector.roi_head.bbox_head = head
    name = 'roi_head.bbox_head'
    loss = RegionPredictionLoss(other_weight=5.0)
    loss.taps = lambda _: [name]  # type: ignore[method-assign]
    with torch.no_grad():
        outputs_T = flatten_tensors(head(torch.randn(2, 8, 7, 7)))
        outputs_S = [output + 1 for output in outputs_T]
    assert len(outputs_T) == 3
    expected = 5 * torch.stack([1 / (t**2).mean() for t in outputs_T]).mean()
    torch.testing.assert_close(loss({name: outputs_S}, {name: outputs_T}, detector), expected)
