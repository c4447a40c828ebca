# SPDX-License-Identifier: Apache-2.0
"""The loss of transformers against MMDetection's losses of DETR and torch.distributions."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mmdet.models.losses import DiceLoss, GIoULoss, L1Loss
from mmdet.models.roi_heads.bbox_heads import DIIHead
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmdet.utils import register_all_modules
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical
from torch.distributions import kl_divergence as reference_kl
from torchvision.ops import generalized_box_iou

from mmzsq.boxes import complete_iou
from mmzsq.distillation import MaskQueryPredictionLoss, QueryPredictionLoss, RegionPredictionLoss
from mmzsq.distillation.queries import generalized_iou
from mmzsq.distillation.regions import query_head_terms
from mmzsq.distillation.two_stage import decode_on_unit_box
from mmzsq.errors import UserError

LAYERS = 3


def detector(use_sigmoid: bool, proposing: bool = False) -> Any:
    head = SimpleNamespace(loss_cls=SimpleNamespace(use_sigmoid=use_sigmoid))
    return SimpleNamespace(bbox_head=head, as_two_stage=proposing, decoder=SimpleNamespace(num_layers=LAYERS))


def outputs(categories: int = 4) -> dict[str, list[Tensor]]:
    """Class logits and boxes of all layers, and of proposals."""
    boxes = [torch.rand(2, 5, 4) * 0.4 + 0.3 for _ in range(LAYERS)]
    return {
        'bbox_head': [*(torch.randn(2, 5, categories) for _ in range(LAYERS)), *boxes],
        'bbox_head.cls_branches.3': [torch.randn(2, 9, categories)],
        'bbox_head.reg_branches.3': [torch.randn(2, 9, 4)],
    }


@pytest.mark.parametrize('use_sigmoid', [True, False])
def test_each_layer_is_compared_by_classes_and_by_the_terms_of_detr(use_sigmoid: bool) -> None:
    torch.manual_seed(0)
    student, teacher = outputs(), outputs()
    expected = torch.zeros(())
    for layer in range(LAYERS):
        (logits_S, bboxes_S), (logits_T, bboxes_T) = (
            (o['bbox_head'][layer], o['bbox_head'][LAYERS + layer]) for o in (student, teacher)
        )
        if use_sigmoid:
            weight = logits_T.sigmoid().amax(-1)
            classes = reference_kl(Bernoulli(logits=logits_T), Bernoulli(logits=logits_S)).sum()
        else:
            weight = logits_T.softmax(-1)[..., :-1].amax(-1)
            classes = reference_kl(Categorical(logits=logits_T), Categorical(logits=logits_S)).sum()
        flat = weight.flatten()
        distance = L1Loss(reduction='sum')(bboxes_S.view(-1, 4), bboxes_T.view(-1, 4), flat[:, None].expand(-1, 4))
        corners = [bbox_cxcywh_to_xyxy(bboxes).view(-1, 4) for bboxes in (bboxes_S, bboxes_T)]
        apart = GIoULoss(reduction='sum')(*corners, flat)
        expected += (2 * classes + 3 * distance + 4 * apart) / weight.sum() / LAYERS
    loss = QueryPredictionLoss(loss_weight=0.5, class_weight=2.0, l1_weight=3.0, iou_weight=4.0)
    torch.testing.assert_close(loss(student, teacher, detector(use_sigmoid)), 0.5 * expected)


def test_proposals_of_queries_are_one_more_layer() -> None:
    torch.manual_seed(0)
    student, teacher = outputs(), outputs()
    loss = QueryPredictionLoss()
    plain = loss(student, teacher, detector(True))
    same = {name: student[name] if name == 'bbox_head' else teacher[name] for name in student}
    torch.testing.assert_close(loss(same, teacher, detector(True, proposing=True)), plain * LAYERS / (LAYERS + 1))
    other = loss(student, teacher, detector(True, proposing=True))
    logits = [o['bbox_head.cls_branches.3'][0] for o in (teacher, student)]
    classes = reference_kl(*(Bernoulli(logits=values) for values in logits)).sum() / logits[0].sigmoid().amax(-1).sum()
    assert float(other) > float(plain * LAYERS + classes) / (LAYERS + 1)


def test_loss_and_its_gradient_are_finite_and_zero_where_student_is_teacher() -> None:
    teacher = outputs()
    student = {name: [m.clone().requires_grad_() for m in maps] for name, maps in teacher.items()}
    loss = QueryPredictionLoss()(student, teacher, detector(True, proposing=True))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5)
    assert all(torch.isfinite(m.grad).all() for maps in student.values() for m in maps)


def test_generalized_iou_is_that_of_torchvision() -> None:
    boxes = torch.rand(20, 2, 2).cumsum(1).flatten(1)
    others = torch.rand(20, 2, 2).cumsum(1).flatten(1)
    torch.testing.assert_close(generalized_iou(boxes, others), generalized_box_iou(boxes, others).diag())


def test_queries_of_sparse_rcnn_are_compared_by_class_and_box() -> None:
    torch.manual_seed(0)
    register_all_modules()
    head = MODELS.build(
        dict(
            type='DIIHead', num_classes=3, in_channels=16, feedforward_channels=16, num_heads=2,
            dynamic_conv_cfg=dict(type='DynamicConv', in_channels=16, feat_channels=4, out_channels=16),
            bbox_coder=dict(type='DeltaXYWHBBoxCoder'), loss_cls=dict(type='FocalLoss', use_sigmoid=True),
        )
    )  # fmt: skip
    assert isinstance(head, DIIHead)
    student, teacher = ([torch.randn(1, 5, 3), 0.1 * torch.randn(1, 5, 4), torch.randn(1, 5, 16)] for _ in range(2))
    weight = teacher[0].sigmoid().amax(-1)
    classes = reference_kl(Bernoulli(logits=teacher[0]), Bernoulli(logits=student[0])).sum() / weight.sum()
    ious = complete_iou(*(decode_on_unit_box(head.bbox_coder, o[1]) for o in (student, teacher)))
    boxes = (weight * (1 - ious)).sum() / weight.sum()
    torch.testing.assert_close(query_head_terms(student, teacher, head), (classes, boxes))

    rcnn = nn.Module()
    rcnn.roi_head = nn.Module()
    rcnn.roi_head.bbox_head = nn.ModuleList([head])
    loss = RegionPredictionLoss(class_weight=2.0, box_weight=3.0, other_weight=5.0)
    loss.taps = lambda _: ['roi_head.bbox_head.0']  # type: ignore[method-assign]
    name = 'roi_head.bbox_head.0'
    others = (student[2] - teacher[2]).square().mean() / teacher[2].square().mean()
    torch.testing.assert_close(loss({name: student}, {name: teacher}, rcnn), 2 * classes + 3 * boxes + 5 * others)


def test_error_for_another_detector_names_an_alternative() -> None:
    with pytest.raises(UserError, match='mmzsq.PredictionLoss'):
        QueryPredictionLoss().taps(nn.Conv2d(1, 1, 1))


def mask_outputs(seed: int) -> list[Tensor]:
    """Class logits, background last, of all layers, then mask logits of all layers."""
    generator = torch.Generator().manual_seed(seed)
    classes = [torch.randn(2, 5, 4, generator=generator) for _ in range(LAYERS)]
    return [*classes, *(torch.randn(2, 5, 6, 7, generator=generator) for _ in range(LAYERS))]


def test_each_layer_of_masks_is_compared_by_classes_pixels_and_dice() -> None:
    student, teacher = mask_outputs(0), mask_outputs(1)
    expected = torch.zeros(())
    for layer in range(LAYERS):
        classes_S, classes_T = student[layer], teacher[layer]
        masks_S, masks_T = (o[LAYERS + layer] for o in (student, teacher))
        weight = classes_T.softmax(-1)[..., :-1].amax(-1)
        classes = reference_kl(Categorical(logits=classes_T), Categorical(logits=classes_S)).sum()
        pixels = reference_kl(Bernoulli(logits=masks_T), Bernoulli(logits=masks_S)).mean((2, 3))
        # The form of V-Net has 1 in numerator and denominator, MMDetection's has half of it in the denominator.
        dice = DiceLoss(reduction='none', eps=0.5)
        apart = torch.stack([dice(s.flatten(1), t.flatten(1).sigmoid()) for s, t in zip(masks_S, masks_T, strict=True)])
        union = (masks_S.sigmoid() ** 2 + masks_T.sigmoid() ** 2).sum((2, 3)) + 1
        apart = apart - 1 / union
        expected += (2 * classes + 3 * (weight * pixels).sum() + 4 * (weight * apart).sum()) / weight.sum() / LAYERS
    loss = MaskQueryPredictionLoss(loss_weight=0.5, class_weight=2.0, mask_weight=3.0, dice_weight=4.0)
    found = loss({'panoptic_head': student}, {'panoptic_head': teacher}, nn.Identity())
    torch.testing.assert_close(found, 0.5 * expected)
    stacked = [{'panoptic_head': [torch.stack(o[:LAYERS]), torch.stack(o[LAYERS:])]} for o in (student, teacher)]
    torch.testing.assert_close(loss(*stacked, nn.Identity()), found)


def test_loss_of_masks_is_zero_where_student_is_teacher_and_pulls_the_student_to_it() -> None:
    teacher = {'panoptic_head': mask_outputs(1)}
    student = {'panoptic_head': [m.clone().requires_grad_() for m in mask_outputs(0)]}
    loss = MaskQueryPredictionLoss()
    assert float(loss(teacher, teacher, nn.Identity())) == pytest.approx(0, abs=1e-5)
    loss(student, teacher, nn.Identity()).backward()
    stepped = {'panoptic_head': [m.detach() - 0.1 * m.grad for m in student['panoptic_head']]}
    assert float(loss(stepped, teacher, nn.Identity())) < float(loss(student, teacher, nn.Identity()))


def test_error_of_the_loss_of_masks_names_an_alternative() -> None:
    with pytest.raises(UserError, match='mmzsq.PredictionLoss'):
        MaskQueryPredictionLoss().taps(nn.Conv2d(1, 1, 1))
