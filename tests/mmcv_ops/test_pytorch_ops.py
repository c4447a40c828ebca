# SPDX-License-Identifier: Apache-2.0
"""MMCV operators written in PyTorch equal plain algorithms and MMCV's implementations for the CPU."""

from __future__ import annotations

import sys

import mmcv.ops
import numpy as np
import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch
from mmdet.models.losses.focal_loss import py_sigmoid_focal_loss
from torch import Tensor

from mmzsq.mmcv_ops.torchvision_ops import TorchvisionOps

pytestmark = pytest.mark.skipif(
    not isinstance(sys.modules.get('mmcv._ext'), TorchvisionOps), reason='a compiled mmcv is installed'
)


def overlap(first: np.ndarray, second: np.ndarray, offset: int = 0) -> float:
    """Compute the IoU of two boxes."""
    low, high = np.maximum(first[:2], second[:2]), np.minimum(first[2:4], second[2:4])
    inside = np.prod(np.clip(high - low + offset, 0, None))
    areas = [np.prod(box[2:4] - box[:2] + offset) for box in (first, second)]
    return float(inside / (sum(areas) - inside))


def random_boxes(count: int) -> Tensor:
    corner = 20 * torch.rand(count, 2)
    return torch.cat((corner, corner + 4 + 10 * torch.rand(count, 2)), 1)


@pytest.mark.parametrize('offset', [0, 1])
@pytest.mark.parametrize('method', ['naive', 'linear', 'gaussian'])
def test_soft_nms_follows_its_paper(method: str, offset: int) -> None:
    boxes, scores = random_boxes(25), torch.rand(25)
    dets, kept = mmcv.ops.soft_nms(boxes, scores, 0.3, sigma=0.4, min_score=0.02, method=method, offset=offset)
    left = {i: float(score) for i, score in enumerate(scores)}
    expected: list[tuple[int, float]] = []
    while left:
        best = max(left, key=left.__getitem__)
        expected.append((best, left.pop(best)))
        for other in list(left):
            iou = overlap(boxes[best].numpy(), boxes[other].numpy(), offset)
            if method == 'gaussian':
                left[other] *= np.exp(-(iou**2) / 0.4)
            elif iou >= 0.3:
                left[other] *= 0.0 if method == 'naive' else 1 - iou
            if left[other] < 0.02:
                del left[other]
    assert kept.tolist() == [index for index, _ in expected]
    torch.testing.assert_close(dets, torch.cat((boxes[kept], torch.tensor([[float(s)] for _, s in expected])), 1))
    assert len(expected) < 25 if method == 'naive' else not torch.equal(dets[:, 4], scores[kept])


def test_nms_match_groups_boxes_by_the_best_box_that_suppresses_them() -> None:
    boxes, scores = random_boxes(30), torch.rand(30)
    groups = mmcv.ops.nms_match(torch.cat((boxes, scores[:, None]), 1), 0.3)
    order, expected = scores.argsort(descending=True).tolist(), []
    while order:
        head = order[0]
        group = [head, *(i for i in order[1:] if overlap(boxes[head].numpy(), boxes[i].numpy()) >= 0.3)]
        expected.append(group)
        order = [i for i in order if i not in group]
    assert [group.tolist() for group in groups] == expected
    assert max(map(len, expected)) > 2
    assert [group[0] for group in expected] == mmcv.ops.nms(boxes, scores, 0.3)[1].tolist()


@pytest.mark.parametrize('weighted', [False, True])
def test_the_focal_loss_for_gpus_equals_mmdetections(weighted: bool) -> None:
    logits, target = torch.randn(7, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 2, 3, 3, 1, 0])
    weight = torch.tensor([0.5, 2.0, 3.0], dtype=torch.float64) if weighted else None
    loss = mmcv.ops.sigmoid_focal_loss(logits, target, 1.5, 0.3, weight, 'none')
    factors = torch.tensor([0.5, 2.0, 3.0, 1.0]).double()[target] if weighted else None
    one_hot = torch.nn.functional.one_hot(target, 4)[:, :3]
    expected = py_sigmoid_focal_loss(logits, one_hot, factors, 1.5, 0.3, reduction='none')
    torch.testing.assert_close(loss, expected)
    upstream = torch.rand_like(loss)
    (grad,), (expected_grad,) = (torch.autograd.grad(value, logits, upstream) for value in (loss, expected))
    torch.testing.assert_close(grad, expected_grad)


def test_deformable_attention_for_gpus_equals_that_for_the_cpu() -> None:
    shapes = torch.tensor([[4, 3], [2, 2]])
    starts = torch.tensor([0, 12])
    value = torch.randn(2, 16, 2, 4, requires_grad=True)
    locations, weights = torch.rand(2, 5, 2, 2, 3, 2, requires_grad=True), torch.rand(2, 5, 2, 2, 3, requires_grad=True)
    out = MultiScaleDeformableAttnFunction.apply(value, shapes, starts, locations, weights, 64)
    expected = multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    torch.testing.assert_close(out, expected)
    upstream = torch.rand_like(out)
    operands = (value, locations, weights)
    for grad, wanted in zip(
        torch.autograd.grad(out, operands, upstream),
        torch.autograd.grad(expected, operands, upstream),
        strict=True,
    ):
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(grad, wanted)
