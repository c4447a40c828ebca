# SPDX-License-Identifier: Apache-2.0
"""MMDetection's assignment by IoU without a loop over objects.

MMDetection's assigner loops over the objects to match each with its nearest anchors. In every iteration, the host waits
for the device. This accounts for two thirds of the synchronizations and a sixth of the operators in a training step of
a two-stage detector.
"""

from __future__ import annotations

import torch
from mmdet.models.task_modules.assigners import AssignResult, MaxIoUAssigner
from torch import Tensor, nn

from mmzsq.registry import TASK_UTILS


@TASK_UTILS.register_module(name='MaxIoUAssigner')
class SyncFreeMaxIoUAssigner(MaxIoUAssigner):
    """MMDetection's ``MaxIoUAssigner`` without synchronization, with the same arguments and results.

    Configs name it ``mmzsq.MaxIoUAssigner``.
    """

    def assign_wrt_overlaps(self, overlaps: Tensor, gt_labels: Tensor) -> AssignResult:
        """Assign each of N boxes to one of K objects, or to none.

        Args:
            overlaps: IoU, (K, N).
            gt_labels: Category index of each object, (K,).
        """
        num_gts, num_bboxes = overlaps.shape
        if num_gts == 0 or num_bboxes == 0:
            return super().assign_wrt_overlaps(overlaps, gt_labels)
        max_overlaps, best = overlaps.max(0)
        bounds = self.neg_iou_thr if isinstance(self.neg_iou_thr, (tuple, list)) else (0, self.neg_iou_thr)
        negative = (max_overlaps >= bounds[0]) & (max_overlaps < bounds[1])
        assigned = torch.where(negative, 0, -1)
        assigned = torch.where(max_overlaps >= self.pos_iou_thr, best + 1, assigned)
        if self.match_low_quality:
            nearest_overlaps, nearest = overlaps.max(1, keepdim=True)
            if self.gt_max_assign_all:
                matches = overlaps == nearest_overlaps
            else:
                matches = torch.zeros_like(overlaps, dtype=torch.bool).scatter_(1, nearest, True)
            matches &= nearest_overlaps >= self.min_pos_iou
            # A box that is nearest to several objects is assigned to the last of them.
            number = torch.arange(1, num_gts + 1, device=overlaps.device)[:, None]
            last = torch.where(matches, number, 0).amax(0)
            assigned = torch.where(last > 0, last, assigned)
        labels = torch.where(assigned > 0, gt_labels[(assigned - 1).clamp(min=0)], -1)
        return AssignResult(num_gts=num_gts, gt_inds=assigned, max_overlaps=max_overlaps, labels=labels)


def replace_max_iou_assigners(model: nn.Module) -> None:
    """Replace every MMDetection ``MaxIoUAssigner`` in the heads of ``model`` by :class:`SyncFreeMaxIoUAssigner`."""
    for module in model.modules():
        for held in vars(module).values():
            for assigner in held if isinstance(held, (list, tuple)) else (held,):
                if type(assigner) is MaxIoUAssigner:
                    assigner.__class__ = SyncFreeMaxIoUAssigner
