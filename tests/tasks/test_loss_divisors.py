# SPDX-License-Identifier: Apache-2.0
"""Divisors of losses are found in any head, and averaged over the parts of an update."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from mmdet.models.losses import CrossEntropyLoss, L1Loss
from torch import Tensor, nn
from torch.nn import functional as F

from mmzsq.tasks.loss_divisors import averaged, averaged_divisors
from mmzsq.update_parts import NamedDivisors, UpdateParts, mean_divisors

OBJECTS = (0, 1, 4, 2)
"""Number of objects of each image."""


class Head(nn.Module):
    """Predicts three numbers for each object."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
        self.loss_bbox = L1Loss()
        self.loss_cls = CrossEntropyLoss()
        self.loss_torch = nn.MSELoss()

    def forward(self, images: Sequence[Tensor]) -> list[Tensor]:
        return [image @ self.weight for image in images]


def argument(head: Head, images: Sequence[Tensor]) -> Tensor:
    rows = torch.cat(head(images))
    return head.loss_bbox(rows, torch.zeros_like(rows), avg_factor=len(rows) + len(images))


def tensor_argument(head: Head, images: Sequence[Tensor]) -> Tensor:
    rows = torch.cat(head(images))
    return head.loss_bbox(rows, torch.zeros_like(rows), avg_factor=torch.tensor(float(len(rows))))


def only_with_objects(head: Head, images: Sequence[Tensor]) -> Tensor:
    rows = torch.cat(head(images))
    return head.loss_bbox(rows, torch.zeros_like(rows), avg_factor=len(rows)) if len(rows) else rows.sum()


def levels(head: Head, images: Sequence[Tensor]) -> Tensor:
    """Some levels have no object, and are left out."""
    rows = torch.cat(head(images))
    chosen = [level for level in (rows[:1], rows[1:3], rows[3:]) if len(level)]
    return sum((head.loss_bbox(level, level * 0, avg_factor=len(rows)) for level in chosen), rows.sum() * 0)


def setting(head: Head, images: Sequence[Tensor]) -> Tensor:
    """A module that sums, and a divisor that is averaged by the head."""
    rows = torch.cat(head(images))
    count = averaged(torch.tensor([float(len(rows))])).clamp(min=1).item()
    return (head.loss_bbox(rows, rows * 0, avg_factor=1.0) if len(rows) else rows.sum()) / count


def averaged_argument(head: Head, images: Sequence[Tensor]) -> Tensor:
    """A minimum that the mean exceeds, and the number of the first part does not."""
    rows = torch.cat(head(images))
    count = max(averaged(torch.tensor([float(len(rows))])).item(), 2.0)
    return head.loss_bbox(rows, torch.zeros_like(rows), avg_factor=count)


def module_mean(head: Head, images: Sequence[Tensor]) -> Tensor:
    rows = torch.cat(head(images))
    return head.loss_cls(rows, torch.zeros(len(rows), dtype=torch.long)) if len(rows) else rows.sum()


def torch_module_mean(head: Head, images: Sequence[Tensor]) -> Tensor:
    rows = torch.cat(head(images))
    return head.loss_torch(rows, torch.ones_like(rows)) if len(rows) else rows.sum()


def function_mean(head: Head, images: Sequence[Tensor]) -> Tensor:
    rows = torch.cat(head(images))
    return F.binary_cross_entropy_with_logits(rows, torch.ones_like(rows)) if len(rows) else rows.sum()


def tensor_mean(head: Head, images: Sequence[Tensor]) -> Tensor:
    rows = torch.cat(head(images))
    return head.loss_bbox(rows, rows * 0, reduction_override='none').mean() if len(rows) else rows.sum()


def mean_of_images(head: Head, images: Sequence[Tensor]) -> Tensor:
    return torch.stack([rows.square().sum() for rows in head(images)]).mean()


def denominator(head: Head, images: Sequence[Tensor]) -> Tensor:
    loss = torch.cat(head(images)).square().sum()
    loss /= sum(len(image) for image in images) + len(images)
    return loss


def denominator_of_images(head: Head, images: Sequence[Tensor]) -> Tensor:
    count = sum(len(image) for image in images) + len(images)
    return torch.stack([rows.square().sum() / count for rows in head(images)]).sum()


WAYS = (
    argument,
    tensor_argument,
    only_with_objects,
    levels,
    setting,
    averaged_argument,
    module_mean,
    torch_module_mean,
    function_mean,
    tensor_mean,
    mean_of_images,
    denominator,
    denominator_of_images,
)


def objects() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, 3, generator=generator, dtype=torch.float64) for count in OBJECTS]


@pytest.mark.parametrize('sizes', [(2, 2), (1, 3), (3, 1)], ids=str)
@pytest.mark.parametrize('loss', WAYS, ids=lambda way: way.__name__)
def test_parts_have_the_gradient_of_one_batch(
    loss: Callable[[Head, Sequence[Tensor]], Tensor], sizes: tuple[int, int]
) -> None:
    head, images = Head(), objects()
    loss(head, images).backward()
    assert head.weight.grad is not None
    whole, head.weight.grad = head.weight.grad, None
    parts = [images[: sizes[0]], images[sizes[0] :]]
    update = UpdateParts(2)
    for part in parts:
        with torch.no_grad(), update.recording(len(part)), averaged_divisors(head):
            loss(head, part)
    for part in parts:
        with update.replaying(), averaged_divisors(head):
            (loss(head, part) / 2).backward()
    torch.testing.assert_close(head.weight.grad, whole, rtol=1e-6, atol=1e-9)


def test_divisors_of_single_images_are_kept() -> None:
    """Each image divides by its own number of objects, as in one batch."""
    head, images = Head(), objects()[1:3] * 2

    def loss(images: Sequence[Tensor]) -> Tensor:
        return torch.stack([rows.square().sum() / len(rows) for rows in head(images)]).mean()

    loss(images).backward()
    assert head.weight.grad is not None
    whole, head.weight.grad = head.weight.grad, None
    update = UpdateParts(2)
    for part in (images[:2], images[2:]):
        with torch.no_grad(), update.recording(2), averaged_divisors(head):
            loss(part)
    for part in (images[:2], images[2:]):
        with update.replaying(), averaged_divisors(head):
            (loss(part) / 2).backward()
    torch.testing.assert_close(head.weight.grad, whole)


def test_divisors_that_differ_between_calls_are_averaged_call_by_call() -> None:
    parts = [NamedDivisors(2, {'level': [1.0, 5.0, 2.0]}), NamedDivisors(2, {'level': [3.0, 7.0, 4.0]})]
    assert mean_divisors(parts) == {'level': [2.0, 6.0, 3.0]}
    # Calls that cannot be matched keep their divisors.
    parts[1].values['level'].pop()
    assert mean_divisors(parts) == {}


def test_a_number_that_all_parts_share_is_a_setting() -> None:
    parts = [NamedDivisors(1, {'loss': [4.0]}, {'loss'}), NamedDivisors(1), NamedDivisors(1, {'loss': [4.0]}, {'loss'})]
    assert mean_divisors(parts) == {}
    parts[0].values['loss'] = [2.0]
    assert mean_divisors(parts) == {'loss': [2.0]}
