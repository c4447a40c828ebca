# SPDX-License-Identifier: Apache-2.0
"""Box arithmetic equals MMDetection's and torchvision's."""

import pytest
import torch
from mmdet.models.task_modules import DeltaXYWHBBoxCoder
from torch.testing import assert_close
from torchvision.ops import batched_nms, box_iou, complete_box_iou

from mmzsq.boxes import DeltaCoder, cluster_nms, complete_iou, paired_iou, pairwise_iou

DEVICE = torch.device('cpu')


def random_bboxes(*shape: int) -> torch.Tensor:
    low = torch.rand(*shape, 2) * 60
    return torch.cat((low, low + 4 + torch.rand(*shape, 2) * 40), dim=-1)


def random_boxes(count: int) -> torch.Tensor:
    corner = torch.rand(count, 2) * 50
    return torch.cat((corner, corner + 1 + torch.rand(count, 2) * 60), dim=1)


def test_pairwise_iou_is_torchvisions_image_by_image() -> None:
    bboxes, others = random_bboxes(2, 7), random_bboxes(2, 5)
    expected = torch.stack([box_iou(*pair) for pair in zip(bboxes, others, strict=True)])
    assert torch.equal(pairwise_iou(bboxes, others), expected)


def test_paired_iou_is_the_diagonal_of_pairwise_iou() -> None:
    bboxes, targets = random_bboxes(3, 7), random_bboxes(3, 7)
    assert torch.equal(paired_iou(bboxes, targets), pairwise_iou(bboxes, targets).diagonal(dim1=1, dim2=2))


def test_iou_of_boxes_without_area_is_0() -> None:
    point = torch.tensor([[3.0, 3.0, 3.0, 3.0]])
    assert paired_iou(point, point).tolist() == [0.0]
    assert pairwise_iou(point, point).tolist() == [[0.0]]


def test_encoding_and_decoding_are_mmdetections() -> None:
    coder = DeltaXYWHBBoxCoder(target_means=(0.1, 0.0, -0.1, 0.0), target_stds=(0.1, 0.1, 0.2, 0.3))
    ours = DeltaCoder.from_mmdet(coder, DEVICE)
    bboxes, targets = random_bboxes(40), random_bboxes(40)
    assert_close(ours.encode(bboxes, targets), coder.encode(bboxes, targets))
    deltas = torch.randn(40, 4) * 20
    assert_close(ours.decode(bboxes, deltas, (50, 80)), coder.decode(bboxes, deltas, max_shape=(50, 80)))


def test_decoded_boxes_are_not_clipped_without_clip_border() -> None:
    coder = DeltaXYWHBBoxCoder(clip_border=False)
    decoded = DeltaCoder.from_mmdet(coder, DEVICE).decode(random_bboxes(40), torch.ones(40, 4), (50, 80))
    assert decoded.max() > 80


def test_cluster_nms_is_greedy_nms_within_a_group() -> None:
    bboxes = random_bboxes(3, 80)
    groups = torch.randint(2, (3, 80))
    eligible = torch.rand(3, 80) > 0.2
    kept = cluster_nms(bboxes, groups, eligible, 0.4)
    falling = torch.arange(80, 0, -1).float()
    for image in range(3):
        index = eligible[image].nonzero().flatten()
        chosen = batched_nms(bboxes[image, index], falling[index], groups[image, index], 0.4)
        assert kept[image].nonzero().flatten().tolist() == sorted(index[chosen].tolist())
        assert 0 < len(chosen) < len(index)


def test_complete_iou_and_its_gradient_are_torchvisions() -> None:
    bboxes, targets = random_boxes(60).requires_grad_(), random_boxes(60)
    expected = complete_box_iou(bboxes, targets).diagonal()
    (expected_grad,) = torch.autograd.grad(expected.sum(), bboxes)
    result = complete_iou(bboxes, targets)
    (grad,) = torch.autograd.grad(result.sum(), bboxes)
    assert_close(result, expected)
    assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_complete_iou_of_a_pair_worked_by_hand() -> None:
    # Squares of 2, one moved right by 1: IoU 2 / 6, squared distance 1, squared diagonal 3^2 + 2^2.
    result = complete_iou(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2]))
    assert result.item() == pytest.approx(1 / 3 - 1 / 13, abs=1e-6)


@pytest.mark.parametrize('size', [1e-3, 1.0, 640.0])
def test_complete_iou_of_equal_boxes_is_1_with_a_finite_gradient(size: float) -> None:
    targets = torch.tensor([[0.3, 0.7, 0.3 + size, 0.7 + 2 * size]])
    bboxes = targets.clone().requires_grad_()
    result = complete_iou(bboxes, targets)
    result.sum().backward()
    assert result.item() == pytest.approx(1, abs=0.05 if size < 1 else 1e-5)
    assert bboxes.grad is not None
    assert bboxes.grad.isfinite().all()


@pytest.mark.parametrize('bad', [[5.0, 5, 5, 5], [5.0, 5, 5, 9], [5.0, 5, 9, 5]])
def test_complete_iou_of_boxes_without_area_is_finite(bad: list[float]) -> None:
    bboxes = torch.tensor([bad, [0.0, 0, 4, 4], bad]).requires_grad_()
    targets = torch.tensor([[0.0, 0, 4, 4], bad, bad])
    result = complete_iou(bboxes, targets)
    result.sum().backward()
    assert result.isfinite().all()
    assert bboxes.grad is not None
    assert bboxes.grad.isfinite().all()


def test_complete_iou_broadcasts() -> None:
    bboxes, targets = random_boxes(6).view(2, 3, 4), random_boxes(2)[:, None]
    expected = complete_box_iou(bboxes[1, 2][None], targets[1])[0, 0]
    assert_close(complete_iou(bboxes, targets)[1, 2], expected)
