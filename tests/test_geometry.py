# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torchvision.ops import complete_box_iou

from mmzsq.boxes import complete_iou


def random_boxes(count: int) -> torch.Tensor:
    corner = torch.rand(count, 2) * 50
    return torch.cat((corner, corner + 1 + torch.rand(count, 2) * 60), dim=1)


def test_values_and_gradients_are_torchvisions() -> None:
    bboxes, targets = random_boxes(60).requires_grad_(), random_boxes(60)
    expected = complete_box_iou(bboxes, targets).diagonal()
    (expected_grad,) = torch.autograd.grad(expected.sum(), bboxes)
    result = complete_iou(bboxes, targets)
    (grad,) = torch.autograd.grad(result.sum(), bboxes)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


def test_hand_worked_pair() -> None:
    # Squares of 2, one moved right by 1: IoU 2 / 6, squared distance 1, squared diagonal 3^2 + 2^2.
    result = complete_iou(torch.tensor([0.0, 0, 2, 2]), torch.tensor([1.0, 0, 3, 2]))
    assert result.item() == pytest.approx(1 / 3 - 1 / 13, abs=1e-6)


@pytest.mark.parametrize('size', [1e-3, 1.0, 640.0])
def test_equal_boxes_have_value_one_and_a_finite_gradient(size: float) -> None:
    targets = torch.tensor([[0.3, 0.7, 0.3 + size, 0.7 + 2 * size]])
    bboxes = targets.clone().requires_grad_()
    result = complete_iou(bboxes, targets)
    result.sum().backward()
    assert result.item() == pytest.approx(1, abs=0.05 if size < 1 else 1e-5)
    assert bboxes.grad is not None
    assert bboxes.grad.isfinite().all()


@pytest.mark.parametrize('bad', [[5.0, 5, 5, 5], [5.0, 5, 5, 9], [5.0, 5, 9, 5]])
def test_boxes_without_area_are_finite(bad: list[float]) -> None:
    bboxes = torch.tensor([bad, [0.0, 0, 4, 4], bad]).requires_grad_()
    targets = torch.tensor([[0.0, 0, 4, 4], bad, bad])
    result = complete_iou(bboxes, targets)
    result.sum().backward()
    assert result.isfinite().all()
    assert bboxes.grad is not None
    assert bboxes.grad.isfinite().all()


def test_pairs_broadcast() -> None:
    bboxes, targets = random_boxes(6).view(2, 3, 4), random_boxes(2)[:, None]
    expected = complete_box_iou(bboxes[1, 2][None], targets[1])[0, 0]
    torch.testing.assert_close(complete_iou(bboxes, targets)[1, 2], expected)
