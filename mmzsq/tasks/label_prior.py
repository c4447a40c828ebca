# SPDX-License-Identifier: Apache-2.0
"""What the weights of a detector's head tell of the labels that it was trained on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from mmcv.cnn import ConvModule
from mmdet.models.dense_heads import YOLOV3Head
from torch import Tensor, nn

from mmzsq.models.yolov5 import YOLOv5Head
from mmzsq.synthesis.label_samplers import LabelPrior
from mmzsq.tasks.support import attribute

HEADS = ('roi_head.bbox_head', 'bbox_head')
"""Where the head that tells categories apart is; of several stages the last."""
BOX_OUTPUTS = 5
"""Outputs of YOLO's heads before the categories: box and objectness."""


def label_prior(detector: nn.Module, num_classes: int) -> LabelPrior:
    """Read frequencies of categories, and sizes of boxes, from the weights of a detector.

    Categories are the probabilities that the biases of the last layers alone give, means over scales and anchors. Sizes
    are the anchors of YOLOv5 and YOLOv3, which are clusters of the training boxes; other anchors are a regular grid.

    Args:
        detector: In any mode.
        num_classes: Categories.

    Returns:
        What there is; on the CPU.
    """
    for name in HEADS:
        head = attribute(detector, name)
        if isinstance(head, nn.ModuleList):
            head = head[-1]
        if isinstance(head, nn.Module):
            rows = list(_probabilities(head, num_classes))
            categories = torch.cat(rows).mean(0) if rows else None
            return LabelPrior(categories, _sizes(head))
    return LabelPrior(None, None)


@torch.no_grad()
def _probabilities(head: Any, num_classes: int) -> Iterator[Tensor]:
    """For each last layer of categories (anchors, C), from its biases."""
    is_yolo = _sizes(head) is not None
    outputs = num_classes + BOX_OUTPUTS if is_yolo else _class_outputs(head, num_classes)
    anchors = getattr(head, 'num_base_priors', 1)
    anchors = anchors if isinstance(anchors, (list, tuple)) else [anchors]
    # What an activation follows is a hidden layer, however many outputs it has.
    hidden = {module.conv for module in head.modules() if isinstance(module, ConvModule) and module.with_activation}
    for name, layer in head.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) or layer.bias is None or layer in hidden:
            continue
        if len(layer.bias) % outputs or not (is_yolo or ('cls' in name and len(layer.bias) // outputs in anchors)):
            continue
        logits = layer.bias.detach().float().cpu().view(-1, outputs)
        if is_yolo:
            yield logits[:, BOX_OUTPUTS:].sigmoid()
        elif outputs == num_classes:
            yield logits.sigmoid()
        else:
            yield logits.softmax(1)[:, :num_classes]


def _class_outputs(head: Any, num_classes: int) -> int:
    """How many outputs an anchor or region has: one more than categories if a softmax counts the background too."""
    outputs = getattr(head, 'cls_out_channels', None)
    if outputs in (num_classes, num_classes + 1):
        return int(outputs)
    return num_classes + (not getattr(getattr(head, 'loss_cls', None), 'use_sigmoid', True))


def _sizes(head: Any) -> Tensor | None:
    """Widths and heights in pixels of anchors that are clusters of training boxes, (K, 2), or None."""
    if isinstance(head, YOLOv5Head):
        return head.anchors.detach().float().cpu().reshape(-1, 2)
    if isinstance(head, YOLOV3Head):
        return torch.tensor(head.prior_generator.base_sizes, dtype=torch.float32).reshape(-1, 2)
    return None
