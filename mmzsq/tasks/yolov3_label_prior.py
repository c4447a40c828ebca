# SPDX-License-Identifier: Apache-2.0
"""Label prior of MMDetection's ``YOLOV3Head``, which cannot implement :class:`LabelPriorHead` itself."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from mmdet.models.dense_heads import YOLOV3Head
from torch import Tensor

from mmzsq.tasks.label_prior import LabelPriorHead, label_prior_head


class YOLOv3LabelPrior:
    """Adapter from a ``YOLOV3Head`` to :class:`~mmzsq.tasks.label_prior.LabelPriorHead`.

    Args:
        head: The head.
    """

    def __init__(self, head: YOLOV3Head) -> None:
        self.head = head

    def anchor_sizes(self) -> Tensor:
        """Return width and height of the anchors of all scales in pixels, (K, 2)."""
        return torch.tensor(self.head.prior_generator.base_sizes, dtype=torch.float32).reshape(-1, 2)

    def class_biases(self) -> Iterator[Tensor]:
        """Yield the biases of the class logits of each scale, (anchors, C)."""
        for conv in self.head.convs_pred:
            # Outputs of an anchor: center x, center y, width, height, objectness, classes.
            yield conv.bias.view(-1, 5 + self.head.num_classes)[:, 5:]


@label_prior_head.register
def _(head: YOLOV3Head) -> LabelPriorHead:
    return YOLOv3LabelPrior(head)
