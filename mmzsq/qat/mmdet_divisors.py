# SPDX-License-Identifier: Apache-2.0
"""Divisors of MMDetection's own losses, and numbers of regions, that cover all images of one weight update.

Heads of MMDetection divide their losses in three ways. Some average the divisor over processes by ``reduce_mean``; here
they average it over all parts of the update. Anchor heads divide by a number that ``get_targets`` returns, which is
replaced. Box and mask heads of a RoI head divide by the number of their own regions; their losses are multiplied by the
ratio of this number to its mean over all parts.

LSQ scales the gradient of a step by the number of quantized elements. In a RoI head this number follows from the number
of regions, which differs between images. It is averaged as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from mmdet.models.dense_heads import AnchorHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import BaseRoIExtractor
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from mmzsq.patching import patched, patched_forwards
from mmzsq.quantization import quantizers
from mmzsq.update_parts import part_count, update_mean

WHOLE_IMAGE_HEADS = ('semantic_head', 'glbctx_head')
"""Children of a RoI head that see whole images."""


@contextmanager
def mmdet_update_means() -> Iterator[None]:
    """Let losses of MMDetection divide by means over all parts of the update inside the block.

    The block must be inside of one of :class:`~mmzsq.update_parts.UpdateParts`. With one part, nothing changes. Covered
    are heads that use ``reduce_mean``, heads that take their divisor from ``AnchorHead.get_targets``, and losses of
    ``BBoxHead`` and ``FCNMaskHead``, with the classes derived from them.
    """
    if part_count(in_update=True) == 1:
        yield
        return
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            # Imported by name.
            if name.startswith('mmdet.models.') and vars(module).get('reduce_mean') is reduce_mean:
                stack.enter_context(patched(module, 'reduce_mean', update_mean))
        stack.enter_context(patched(AnchorHead, 'get_targets', _anchor_targets(AnchorHead.get_targets)))
        stack.enter_context(patched(BBoxHead, 'loss', _box_loss(BBoxHead.loss)))
        stack.enter_context(patched(FCNMaskHead, 'loss_and_target', _mask_loss(FCNMaskHead.loss_and_target)))
        yield


@contextmanager
def update_regions(detector: nn.Module) -> Iterator[None]:
    """Scale the gradients of steps in a RoI head by the regions of the whole update inside the block.

    Each call of a RoI extractor asks for one mean over all parts. Each part must call them in the same order.

    Args:
        detector: A detector, with or without quantizers. Nothing changes for one without a RoI head, and with one part.
    """
    roi_head = getattr(detector, 'roi_head', None)
    parts = part_count(in_update=True)
    if parts == 1 or not isinstance(roi_head, nn.Module):
        yield
        return
    affected = [
        (quantizer, quantizer.update_ratio)
        for name, quantizer in quantizers(roi_head)
        if not name.endswith('weight_quantizer') and name.split('.')[0] not in WHOLE_IMAGE_HEADS
    ]

    def counting(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def extract(feats: Any, rois: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            own = len(rois)
            mean = update_mean(_number(own, rois))
            # Without regions, no gradient is scaled.
            ratio = parts * float(mean) / own if own else 1.0
            for quantizer, _ in affected:
                quantizer.update_ratio = ratio
            return forward(feats, rois, *args, **kwargs)

        return extract

    extractors = [module for module in roi_head.modules() if isinstance(module, BaseRoIExtractor)]
    try:
        with patched_forwards({extractor: counting(extractor.forward) for extractor in extractors}):
            yield
    finally:
        for quantizer, ratio in affected:
            quantizer.update_ratio = ratio


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
        divisor = update_mean(_number(targets[4], targets[0][0])).squeeze(0)
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
        result = loss_and_target(self, mask_preds, *args, **kwargs)
        own = _number(len(mask_preds), mask_preds)
        share = _share(own, update_mean(own))
        return dict(result, loss_mask={name: value * share for name, value in result['loss_mask'].items()})

    return average
