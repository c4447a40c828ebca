# SPDX-License-Identifier: Apache-2.0
"""The loss of two-stage detectors, against loops over anchors and RoIs and MMDetection's own decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical
from torch.distributions import kl_divergence as reference_kl
from torchvision.ops import box_iou, complete_box_iou

from mmzsq.boxes import complete_iou
from mmzsq.distillation import (
    MASK_ROI_INDICES,
    TwoStagePredictionLoss,
    foreground,
    most_confident_indices,
    two_stage_unsupported_reason,
)
from mmzsq.distillation.two_stage import box_head_terms, decode_on_unit_box, mask_term, rpn_predictions
from mmzsq.errors import UserError

RPN_CODER = DeltaXYWHBBoxCoder()
BOX_CODER = DeltaXYWHBBoxCoder(target_stds=(0.1, 0.1, 0.2, 0.2))
UNIT = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
CLASSES = 3


def box_loss(coder: DeltaXYWHBBoxCoder, student: Tensor, teacher: Tensor) -> float:
    """1 - CIoU of the boxes that two vectors of four deltas encode."""
    return 1 - float(complete_box_iou(coder.decode(UNIT, student[None]), coder.decode(UNIT, teacher[None])))


def masks_kl(student: Tensor, teacher: Tensor) -> float:
    return float(reference_kl(Bernoulli(logits=teacher), Bernoulli(logits=student)).mean())


@pytest.mark.parametrize('class_agnostic', [False, True])
def test_box_head_terms_are_those_of_a_loop_over_rois(class_agnostic: bool) -> None:
    rois = 5
    student, teacher = (
        [4 * torch.randn(rois, CLASSES + 1), torch.randn(rois, 4 if class_agnostic else 4 * CLASSES)] for _ in range(2)
    )
    classes = boxes = total = 0.0
    for s_logits, s_deltas, t_logits, t_deltas in zip(*student, *teacher, strict=True):
        classes += float(reference_kl(Categorical(logits=t_logits), Categorical(logits=s_logits)))
        probabilities = t_logits.softmax(0)[:CLASSES]
        score, label = float(probabilities.max()), int(probabilities.argmax())
        own = slice(0, 4) if class_agnostic else slice(4 * label, 4 * label + 4)
        boxes += score * box_loss(BOX_CODER, s_deltas[own], t_deltas[own])
        total += score
    assert total > 1
    got = box_head_terms(student, teacher, BOX_CODER)
    assert [float(term) for term in got] == pytest.approx([classes / total, boxes / total], rel=1e-4)


def test_background_counts_for_categories_alone() -> None:
    """If the teacher is certain of background, any object of the student is an error, whatever its box."""
    teacher = [torch.tensor([[-9.0, -9.0, -9.0, 20.0]]), torch.zeros(1, 12)]
    student = [torch.tensor([[9.0, -9.0, -9.0, 9.0]]), torch.ones(1, 12)]
    classes, boxes = box_head_terms(student, teacher, BOX_CODER)
    assert float(classes) == pytest.approx(float(torch.tensor(2.0).log()), rel=1e-3)
    assert float(boxes) < 1e-6


@pytest.mark.parametrize('class_agnostic', [False, True])
def test_the_mask_term_is_that_of_the_teachers_category_weighted_by_its_score(class_agnostic: bool) -> None:
    channels = 1 if class_agnostic else CLASSES
    student, teacher = torch.randn(2, 4, channels, 3, 5).unbind(0)
    found = foreground(3 * torch.randn(4, CLASSES + 1))
    expected = 0.0
    for s, t, score, label in zip(student, teacher, *found, strict=True):
        channel = 0 if class_agnostic else int(label)
        expected += float(score) * masks_kl(s[channel], t[channel])
    assert float(found.scores.sum()) > 1
    assert float(mask_term(student, teacher, found)) == pytest.approx(expected / float(found.scores.sum()), rel=1e-4)


def test_the_loss_without_rois_is_zero() -> None:
    boxes = [torch.zeros(0, CLASSES + 1, requires_grad=True), torch.zeros(0, 12, requires_grad=True)]
    masks = torch.zeros(0, CLASSES, 4, 4, requires_grad=True)
    loss = sum(box_head_terms(boxes, boxes, BOX_CODER)) + mask_term(masks, masks, foreground(boxes[0]))
    loss.backward()
    assert loss.item() == 0


def test_the_best_rois_of_each_image_are_taken() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.2, 0.8])
    # Three of the first image, none of the second, one of the third, two of the last.
    assert most_confident_indices(scores, [3, 0, 1, 2], 2).tolist() == [1, 2, 3, 5, 4]
    assert most_confident_indices(scores[:0], [0, 0], 2).tolist() == []


def test_overlap_in_the_frame_of_an_anchor_is_that_in_the_image() -> None:
    anchors = torch.tensor([[10.0, 20.0, 90.0, 40.0], [0.0, 0.0, 8.0, 30.0]])
    student, teacher = torch.randn(2, 2, 4).mul(0.3).unbind(0)
    in_image = [RPN_CODER.decode(anchors, deltas) for deltas in (student, teacher)]
    in_frame = [decode_on_unit_box(RPN_CODER, deltas) for deltas in (student, teacher)]
    torch.testing.assert_close(box_iou(*in_frame).diag(), box_iou(*in_image).diag(), rtol=1e-4, atol=1e-5)
    # So is complete IoU where anchors are square.
    square = torch.tensor([[30.0, 50.0, 62.0, 82.0]]).expand(2, 4)
    in_image = [RPN_CODER.decode(square, deltas) for deltas in (student, teacher)]
    torch.testing.assert_close(complete_iou(*in_frame), complete_iou(*in_image), rtol=1e-4, atol=1e-5)


def test_maps_of_the_proposal_network_are_decoded_as_in_mmdetection(tiny_cfg: Callable[[str], Any]) -> None:
    """Its own proposals, unsuppressed, are the most objective of the anchors and decode to the same boxes."""
    detector = MODELS.build(tiny_cfg('faster-rcnn_r18')).eval()
    rpn = detector.rpn_head
    sizes = [(8, 6), (4, 3), (2, 2), (1, 1), (1, 1)]
    maps = [torch.randn(1, 3, *size) for size in sizes] + [0.1 * torch.randn(1, 12, *size) for size in sizes]
    bboxes, objectness, classes = rpn_predictions(maps, rpn.bbox_coder)
    anchors = torch.cat(rpn.prior_generator.grid_priors(sizes, device='cpu'))
    assert bboxes.shape == (1, len(anchors), 4) and classes.shape == (1, len(anchors), 0)
    cfg = rpn.test_cfg.copy()
    cfg.nms.iou_threshold = 1.0
    [proposals] = rpn.predict_by_feat(maps[:5], maps[5:], batch_img_metas=[dict(img_shape=(10**6, 10**6))], cfg=cfg)
    order = objectness[0].argsort(descending=True)
    torch.testing.assert_close(objectness[0, order].sigmoid(), proposals.scores)
    size, corner = anchors[:, 2:] - anchors[:, :2], anchors[:, :2]
    in_image = bboxes[0] * size.repeat(1, 2) + corner.repeat(1, 2)
    # Proposals are clipped to the image, whose left and upper edge are 0.
    torch.testing.assert_close(in_image[order].clamp(min=0), proposals.bboxes, rtol=1e-4, atol=1e-3)


def loss_and_terms(detector: nn.Module) -> tuple[float, dict[str, float]]:
    """The whole loss of random outputs, and its terms by loops."""
    rpn_S, rpn_T = ([torch.randn(2, 3, 2, 2), 0.3 * torch.randn(2, 12, 2, 2)] for _ in range(2))
    box_S, box_T = ([3 * torch.randn(6, CLASSES + 1), torch.randn(6, 12)] for _ in range(2))
    mask_S, mask_T = torch.randn(2, 3, CLASSES, 4, 4).unbind(0)
    mask_rois = torch.tensor([4, 0, 5])
    student = {'rpn_head': rpn_S, 'roi_head.bbox_head': box_S, 'roi_head.mask_head': [mask_S]}
    teacher = {
        'rpn_head': rpn_T,
        'roi_head.bbox_head': box_T,
        'roi_head.mask_head': [mask_T],
        MASK_ROI_INDICES: [mask_rois],
    }
    rpn = total = 0.0
    for image in range(2):
        for anchor in range(3):
            for y in range(2):
                for x in range(2):
                    s, t = (maps[0][image, anchor, y, x] for maps in (rpn_S, rpn_T))
                    deltas = (maps[1][image, 4 * anchor : 4 * anchor + 4, y, x] for maps in (rpn_S, rpn_T))
                    rpn += masks_kl(s, t) + float(t.sigmoid()) * box_loss(RPN_CODER, *deltas)
                    total += float(t.sigmoid())
    classes, boxes = box_head_terms(box_S, box_T, BOX_CODER)
    masks = mask_term(mask_S, mask_T, foreground(box_T[0][mask_rois]))
    terms = dict(rpn=rpn / total, classes=float(classes), boxes=float(boxes), masks=float(masks))
    weights = dict(rpn_weight=0.5, class_weight=2.0, box_weight=3.0, mask_weight=5.0)
    loss = TwoStagePredictionLoss(loss_weight=0.1, **weights)
    return float(loss(student, teacher, detector)), terms


def test_the_loss_is_the_weighted_sum_of_its_terms(tiny_cfg: Callable[[str], Any]) -> None:
    loss, terms = loss_and_terms(MODELS.build(tiny_cfg('mask-rcnn_r18')))
    expected = 0.5 * terms['rpn'] + 2 * terms['classes'] + 3 * terms['boxes'] + 5 * terms['masks']
    assert loss == pytest.approx(0.1 * expected, rel=1e-4)


@pytest.mark.parametrize(
    ('name', 'change', 'reason'),
    [
        ('retinanet_r18', {}, 'RetinaNet is not a TwoStageDetector'),
        ('faster-rcnn_r18', {'roi_head.type': 'DoubleHeadRoIHead', 'roi_head.reg_roi_scale_factor': 1.3}, '_bbox_'),
        (
            'faster-rcnn_r18',
            {'roi_head.bbox_head.loss_cls': dict(type='SeesawLoss', num_classes=3, _delete_=True)},
            'SeesawLoss',
        ),
        ('faster-rcnn_r18', {'rpn_head.loss_cls.use_sigmoid': False}, 'sigmoid scores'),
    ],
)
def test_error_for_unsupported_heads_gives_the_reason(
    tiny_cfg: Callable[[str], Any], name: str, change: dict[str, Any], reason: str
) -> None:
    cfg = Config(dict(model=tiny_cfg(name)))
    cfg.merge_from_dict({f'model.{key}': value for key, value in change.items()})
    detector = MODELS.build(cfg.model)
    assert reason in str(two_stage_unsupported_reason(detector))
    with pytest.raises(UserError, match='PredictionLoss') as error:
        TwoStagePredictionLoss().taps(detector)
    assert reason in str(error.value)
