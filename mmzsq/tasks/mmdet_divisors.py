# SPDX-License-Identifier: Apache-2.0
"""Divisors of MMDetection's losses that :mod:`~mmzsq.tasks.loss_divisors` cannot find, averaged over an update.

``reduce_mean`` averages a divisor over processes; here it averages it over all parts of the update. Anchor heads divide
by a number that ``get_targets`` returns, in their loss modules and outside of them. Box heads and mask heads count
regions without an object, but compute no loss if there is no other. SOLO adds one to the number of objects. YOLOv3 and
corner heads divide some losses by nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import torch
from mmdet.models.dense_heads import AnchorHead, DecoupledSOLOHead, SOLOHead, SOLOV2Head, YOLOV3Head
from mmdet.models.losses import AssociativeEmbeddingLoss
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.utils import reduce_mean
from torch import Tensor

from mmzsq.patching import patched
from mmzsq.tasks.loss_divisors import averaged, averaged_divisors, unchanged_divisors
from mmzsq.update_parts import part_count, update_mean


@contextmanager
def mmdet_update_means(detector: Any) -> Iterator[None]:
    """Let the losses of a detector of MMDetection divide by means over all parts of the update inside the block.

    The block must be inside of one of :class:`~mmzsq.update_parts.UpdateParts`. With one part, nothing changes.

    Args:
        detector: Any detector.
    """
    if part_count(in_update=True) == 1:
        yield
        return
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            # Imported by name, also by heads of other projects.
            imports = isinstance(module, ModuleType) and vars(module).get('reduce_mean') is reduce_mean
            if imports and not name.startswith(('mmdet.utils', 'mmzsq.')):
                stack.enter_context(patched(module, 'reduce_mean', averaged))
        for owner, method, wrap in REPLACED:
            stack.enter_context(patched(owner, method, wrap(getattr(owner, method))))
        stack.enter_context(averaged_divisors(detector))
        yield


def _number(value: float | Tensor, like: Tensor) -> Tensor:
    """Return a number as a tensor (1,) that is exact up to 2**24, on the device of ``like``."""
    return torch.as_tensor(value, dtype=torch.float32, device=like.device).detach().reshape(1)


def _share(own: Tensor, mean: Tensor) -> Tensor:
    """Return the factor of a loss that was divided by at least one, so that it is divided by the mean over parts.

    One batch with all images would divide by at least one, too.
    """
    return (own.clamp(min=1) / mean.clamp(min=1 / part_count(in_update=True))).squeeze(0)


def _anchor_targets(get_targets: Callable[..., Any]) -> Callable[..., Any]:
    def average(self: Any, *args: Any, **kwargs: Any) -> Any:
        targets = get_targets(self, *args, **kwargs)
        if targets is None:
            # No anchor is inside of an image.
            return targets
        # Labels, their weights, boxes, their weights, and the divisor; each of the first four by level.
        divisor = averaged(_number(targets[4], targets[0][0])).squeeze(0)
        return (*targets[:4], divisor, *targets[5:])

    return average


def _box_loss(loss: Callable[..., Any]) -> Callable[..., Any]:
    def average(
        self: Any,
        cls_score: Tensor | None,
        bbox_pred: Tensor | None,
        rois: Tensor,
        labels: Tensor,
        label_weights: Tensor,
        bbox_targets: Tensor,
        bbox_weights: Tensor,
        reduction_override: str | None = None,
    ) -> Any:
        with unchanged_divisors():
            losses = loss(
                self, cls_score, bbox_pred, rois, labels, label_weights, bbox_targets, bbox_weights, reduction_override
            )
        if reduction_override == 'none':
            # Of hard example mining, which compares single boxes.
            return losses
        own = torch.cat([_number((label_weights > 0).sum(), labels), _number(len(bbox_targets), labels)])
        of_classes, of_boxes = map(_share, own.split(1), update_mean(own).split(1))
        return {
            name: value * (of_boxes if name == 'loss_bbox' else of_classes) if name.startswith('loss') else value
            for name, value in losses.items()
        }

    return average


def _mask_loss(loss_and_target: Callable[..., Any]) -> Callable[..., Any]:
    def average(self: Any, mask_preds: Tensor, *args: Any, **kwargs: Any) -> Any:
        with unchanged_divisors():
            result = loss_and_target(self, mask_preds, *args, **kwargs)
        own = _number(len(mask_preds), mask_preds)
        share = _share(own, update_mean(own))
        return dict(result, loss_mask={name: value * share for name, value in result['loss_mask'].items()})

    return average


def _solo_loss(loss_by_feat: Callable[..., Any]) -> Callable[..., Any]:
    def average(self: Any, *args: Any, **kwargs: Any) -> Any:
        forward = self.loss_cls.forward

        def classify(scores: Tensor, labels: Tensor, avg_factor: Any) -> Tensor:
            # One batch adds one, whatever its number of parts.
            objects = averaged(_number(avg_factor - 1, scores)).squeeze(0)
            return forward(scores, labels, avg_factor=objects + 1 / part_count(in_update=True))

        with patched(self.loss_cls, 'forward', classify):
            return loss_by_feat(self, *args, **kwargs)

    return average


def _sum_of_levels(loss_by_feat_single: Callable[..., Any]) -> Callable[..., Any]:
    def add(self: Any, *args: Any, **kwargs: Any) -> Any:
        modules = (self.loss_cls, self.loss_conf, self.loss_xy, self.loss_wh)
        losses = loss_by_feat_single(self, *args, **kwargs)
        parts = part_count(in_update=True)
        return tuple(
            value * parts if module.reduction == 'sum' else value for value, module in zip(losses, modules, strict=True)
        )

    return add


def _sum_of_images(forward: Callable[..., Any]) -> Callable[..., Any]:
    def add(self: Any, *args: Any, **kwargs: Any) -> Any:
        parts = part_count(in_update=True)
        return tuple(value * parts for value in forward(self, *args, **kwargs))

    return add


REPLACED: tuple[tuple[type, str, Callable[..., Any]], ...] = (
    (AnchorHead, 'get_targets', _anchor_targets),
    (BBoxHead, 'loss', _box_loss),
    (FCNMaskHead, 'loss_and_target', _mask_loss),
    (SOLOHead, 'loss_by_feat', _solo_loss),
    (DecoupledSOLOHead, 'loss_by_feat', _solo_loss),
    (SOLOV2Head, 'loss_by_feat', _solo_loss),
    (YOLOV3Head, 'loss_by_feat_single', _sum_of_levels),
    (AssociativeEmbeddingLoss, 'forward', _sum_of_images),
)
"""Class, name of a method, and the function that returns its replacement."""
