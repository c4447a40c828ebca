# SPDX-License-Identifier: Apache-2.0
"""Assignment by IoU without synchronization equals MMDetection's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmdet.models.task_modules.assigners import MaxIoUAssigner
from mmdet.registry import TASK_UTILS as MMDET_TASK_UTILS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmzsq.models.max_iou_assigner import SyncFreeMaxIoUAssigner, replace_max_iou_assigners

RPN = dict(pos_iou_thr=0.7, neg_iou_thr=0.3, min_pos_iou=0.3, match_low_quality=True)
ROI = dict(pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.5, match_low_quality=False)
BAND = dict(pos_iou_thr=0.6, neg_iou_thr=(0.1, 0.4), min_pos_iou=0.0, match_low_quality=True)


def overlaps_of(objects: int, boxes: int, seed: int) -> torch.Tensor:
    """Draw IoUs from few distinct values, with ties in rows and columns and some objects without a close box."""
    generator = torch.Generator().manual_seed(seed)
    overlaps = torch.randint(0, 11, (objects, boxes), generator=generator) / 10
    scale = torch.rand(objects, 1, generator=generator).round(decimals=1)
    return overlaps * scale


@pytest.mark.parametrize('rules', [RPN, ROI, BAND, dict(RPN, gt_max_assign_all=False), dict(BAND, min_pos_iou=0.2)])
@pytest.mark.parametrize(('objects', 'boxes'), [(1, 1), (3, 20), (12, 300), (0, 5), (4, 0), (0, 0)])
def test_assignments_are_mmdetections(rules: dict[str, Any], objects: int, boxes: int) -> None:
    for seed in range(5):
        overlaps = overlaps_of(objects, boxes, seed)
        labels = torch.randint(0, 80, (objects,))
        result, expected = (
            kind(**rules).assign_wrt_overlaps(overlaps.clone(), labels)
            for kind in (SyncFreeMaxIoUAssigner, MaxIoUAssigner)
        )
        for key in ('gt_inds', 'labels', 'max_overlaps'):
            torch.testing.assert_close(getattr(result, key), getattr(expected, key), rtol=0, atol=0)
        assert result.num_gts == expected.num_gts == objects


class Waits(TorchDispatchMode):
    """Count the operators that make the host wait for a result."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default) else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        self.count += by_mask or func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('rules', [RPN, ROI, BAND])
def test_assignment_never_waits_for_the_device(rules: dict[str, Any]) -> None:
    overlaps, labels = overlaps_of(12, 300, 0), torch.zeros(12, dtype=torch.long)
    with Waits() as own:
        SyncFreeMaxIoUAssigner(**rules).assign_wrt_overlaps(overlaps, labels)
    with Waits() as reference:
        MaxIoUAssigner(**rules).assign_wrt_overlaps(overlaps, labels)
    assert own.count == 0 < reference.count


def test_only_assigners_of_the_exact_class_are_replaced() -> None:
    class Own(MaxIoUAssigner):
        pass

    head, cascade = nn.Module(), nn.Module()
    head.assigner = MaxIoUAssigner(**RPN)  # type: ignore[assignment]
    cascade.bbox_assigner = [MaxIoUAssigner(**ROI), Own(**ROI)]  # type: ignore[assignment]
    replace_max_iou_assigners(nn.Sequential(head, cascade))
    assert type(head.assigner) is SyncFreeMaxIoUAssigner
    assert [type(assigner) for assigner in cascade.bbox_assigner] == [SyncFreeMaxIoUAssigner, Own]


def test_configs_can_name_it() -> None:
    assert type(MMDET_TASK_UTILS.build(dict(type='mmzsq.MaxIoUAssigner', **RPN))) is SyncFreeMaxIoUAssigner
