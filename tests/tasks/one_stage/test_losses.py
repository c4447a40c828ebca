# SPDX-License-Identifier: Apache-2.0
"""Losses without reduction equal those of MMDetection's modules."""

from __future__ import annotations

import pytest
import torch
from mmdet.models.losses import (
    CIoULoss,
    CrossEntropyLoss,
    DIoULoss,
    GIoULoss,
    IoULoss,
    L1Loss,
    QualityFocalLoss,
    SmoothL1Loss,
)
from torch import Tensor, nn

from mmzsq.tasks.elementwise_losses import elementwise_loss, positive_box_loss, unweighted_l1_loss


def draw_boxes(seed: int) -> Tensor:
    """Draw boxes (2, 50, 4), some of zero area and some far away."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(2, 50, 2, generator=generator) * 20
    sides = torch.rand(2, 50, 2, generator=generator) * 20
    sides[:, :3] = 0
    corners[:, -3:] += 1000
    return torch.cat((corners, corners + sides), -1)


IOU_LOSSES = (
    IoULoss(mode='log', loss_weight=2.0),
    IoULoss(mode='square', eps=1e-16),
    IoULoss(mode='linear'),
    IoULoss(linear=True),
    GIoULoss(loss_weight=3.0),
    DIoULoss(),
    CIoULoss(),
)


@pytest.mark.filterwarnings('ignore:DeprecationWarning')
@pytest.mark.parametrize('loss', IOU_LOSSES, ids=lambda loss: f'{type(loss).__name__}-{getattr(loss, "mode", "")}')
def test_the_loss_of_boxes_is_the_modules(loss: nn.Module) -> None:
    bboxes, targets = draw_boxes(0).requires_grad_(), draw_boxes(1)
    errors = elementwise_loss(loss, bboxes, targets)
    expected = loss(bboxes.flatten(0, 1), targets.flatten(0, 1), reduction_override='none').view(2, 50)
    torch.testing.assert_close(errors, expected)
    gradients = [torch.autograd.grad(value.sum(), bboxes)[0] for value in (errors, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    'loss', [L1Loss(loss_weight=2.0), SmoothL1Loss(beta=0.3)], ids=lambda loss: type(loss).__name__
)
def test_the_unweighted_loss_of_offsets_is_the_modules_without_weight(loss: nn.Module) -> None:
    offsets, targets = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    expected = loss(offsets, targets, reduction_override='none')
    torch.testing.assert_close(loss.loss_weight * unweighted_l1_loss(loss, offsets, targets), expected)


@pytest.mark.parametrize(
    'loss', [L1Loss(loss_weight=2.0), SmoothL1Loss(beta=0.3)], ids=lambda loss: type(loss).__name__
)
def test_the_loss_of_offsets_is_the_modules(loss: nn.Module) -> None:
    offsets, targets = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    torch.testing.assert_close(
        elementwise_loss(loss, offsets, targets), loss(offsets, targets, reduction_override='none')
    )


def test_binary_cross_entropy_is_the_modules() -> None:
    loss = CrossEntropyLoss(use_sigmoid=True, reduction='sum', loss_weight=2.0)
    logits, targets = torch.randn(2, 5, 3), torch.rand(2, 5, 3)
    torch.testing.assert_close(
        elementwise_loss(loss, logits, targets).sum(), loss(logits.flatten(0, 1), targets.flatten(0, 1))
    )


def test_quality_focal_loss_is_the_modules() -> None:
    loss = QualityFocalLoss(beta=1.5, loss_weight=2.0)
    logits, labels, scores = torch.randn(20, 3), torch.randint(0, 4, (20,)), torch.rand(20)
    wanted = nn.functional.one_hot(labels, 4)[:, :3] * scores[:, None]
    expected = loss(logits, (labels, scores), reduction_override='none')
    torch.testing.assert_close(elementwise_loss(loss, logits[None], wanted[None])[0].sum(-1), expected)


@pytest.mark.parametrize('loss', [GIoULoss(), CIoULoss(), IoULoss(mode='log')], ids=lambda loss: type(loss).__name__)
def test_background_boxes_affect_neither_loss_nor_gradient(loss: nn.Module) -> None:
    bboxes, targets = draw_boxes(0), draw_boxes(1)
    bboxes[:, 10:] = torch.nan
    bboxes.requires_grad_()
    positive = (torch.arange(50) < 10).expand(2, -1)
    errors = positive_box_loss(loss, bboxes, targets, positive)
    assert errors.isfinite().all()
    assert not errors[:, 10:].any()
    (gradient,) = torch.autograd.grad(errors.sum(), bboxes)
    assert gradient.isfinite().all()
    assert gradient[:, 3:10].any()
