# SPDX-License-Identifier: Apache-2.0
"""The loss and gradient of each head equal MMDetection's for the same maps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.tasks.detection_task import sum_losses
from mmzsq.tasks.one_stage.support import BATCHED_LOSSES

SIZE = (96, 128)
STRIDES = {'yolox': (8, 16, 32), 'rtmdet': (8, 16, 32), 'yolov3': (32, 16, 8)}
CHANNELS = {'yolov3': 96}


def features(name: str, images: int) -> list[Tensor]:
    """Return random inputs of the head ``name`` for images of SIZE."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(-(-SIZE[0] // stride), -(-SIZE[1] // stride)) for stride in STRIDES.get(name, (8, 16, 32, 64, 128))]
    channels = CHANNELS.get(name, 16)
    return [torch.randn(images, channels, *size, generator=generator).requires_grad_() for size in sizes]


def both_losses(name: str, head: Any, labels: list[InstanceData], feats: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the batched loss and MMDetection's own for the same maps."""
    maps = head(feats)
    metas = [dict(img_shape=SIZE, pad_shape=SIZE)] * len(labels)
    expected = sum_losses(head.loss_by_feat(*maps, labels, metas))
    batched = BATCHED_LOSSES[type(head)]
    sizes = [(level.shape[2], level.shape[3]) for level in maps[0]]
    return batched.loss(head, maps, batched.assign(head, labels, sizes, SIZE)), expected


def assert_equal_losses(name: str, head: nn.Module, labels: list[InstanceData]) -> None:
    feats = features(name, len(labels))
    loss, expected = both_losses(name, head, labels, feats)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    gradients, wanted = (torch.autograd.grad(value, feats, retain_graph=True) for value in (loss, expected))
    norm = max(float(gradient.norm()) for gradient in wanted)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-4, atol=1e-5 * norm)


def test_loss_and_gradient_are_mmdetections(
    make_head: Callable[..., nn.Module], name: str, awkward_labels: list[InstanceData]
) -> None:
    assert_equal_losses(name, make_head(name), awkward_labels)


@pytest.mark.parametrize(
    ('name', 'changes'),
    [
        ('yolox', dict(bbox_head__loss_bbox=dict(_delete_=True, type='CIoULoss', reduction='sum', loss_weight=2.0))),
        ('yolox', dict(bbox_head__loss_cls__loss_weight=0.5, bbox_head__loss_obj__loss_weight=3.0)),
        ('yolox', dict(train_cfg__assigner=dict(center_radius=1.0, candidate_topk=4, iou_weight=1.0, cls_weight=2.0))),
        ('rtmdet', dict(train_cfg__pos_weight=2.0, bbox_head__exp_on_reg=True)),
        ('rtmdet', dict(train_cfg__assigner=dict(topk=3, soft_center_radius=1.0, iou_weight=0.5))),
        ('rtmdet', dict(bbox_head__loss_bbox=dict(_delete_=True, type='DIoULoss'), bbox_head__with_objectness=True)),
        ('retinanet', dict(train_cfg__pos_weight=2.0, bbox_head__loss_bbox=dict(type='SmoothL1Loss', beta=0.1))),
        ('atss', dict(bbox_head__loss_bbox=dict(_delete_=True, type='IoULoss', mode='log'))),
    ],
)
def test_settings_of_losses_and_assignment_take_effect(
    make_head: Callable[..., nn.Module],
    labels: Callable[..., list[InstanceData]],
    name: str,
    changes: dict[str, Any],
) -> None:
    plain, changed = make_head(name), make_head(name, **changes)
    changed.load_state_dict(plain.state_dict(), strict=False)
    wanted = labels((3, 1, 8))
    assert_equal_losses(name, changed, wanted)
    before = both_losses(name, plain, wanted, features(name, 3))[0]
    assert both_losses(name, changed, wanted, features(name, 3))[0] != before


@pytest.mark.parametrize('name', ['yolox', 'rtmdet'])
def test_ties_in_cost_match_as_many_locations_as_mmdetection(make_head: Callable[..., nn.Module], name: str) -> None:
    """Any of the locations with equal cost may be matched, but not more than k of them."""
    head = make_head(name)
    feats = [torch.zeros_like(level) for level in features(name, 2)]
    middle = [InstanceData(bboxes=torch.tensor([[40.0, 24.0, 88.0, 72.0]]), labels=torch.tensor([1]))] * 2
    loss, expected = both_losses(name, head, middle, feats)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
