# SPDX-License-Identifier: Apache-2.0
"""Estimate statistics of a detector's training labels from the weights of its head.

Nothing here depends on an architecture. Heads whose anchors are clusters of the training boxes implement
:class:`LabelPriorHead`. A head from another package gets an adapter, registered with :func:`label_prior_head`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import singledispatch
from typing import Any, Protocol, runtime_checkable

import torch
from mmcv.cnn import ConvModule
from torch import Tensor, nn

from mmzsq.synthesis.label_samplers import LabelPrior
from mmzsq.tasks.support import nested_attribute

CLASS_HEADS = ('roi_head.bbox_head', 'bbox_head')
"""Attributes that may hold the head that predicts categories. In a cascade, the last stage is used."""


@runtime_checkable
class LabelPriorHead(Protocol):
    """A head whose anchors are clusters of the training boxes."""

    def anchor_sizes(self) -> Tensor:
        """Return width and height of the anchors in pixels, (K, 2)."""

    def class_biases(self) -> Iterable[Tensor]:
        """Return the biases of the class logits, before the sigmoid, of each scale: (anchors, C)."""


@singledispatch
def label_prior_head(head: Any) -> LabelPriorHead | None:
    """Return a head as :class:`LabelPriorHead`, or None if its anchors are not clusters of boxes.

    To support a head that does not implement the protocol, register an adapter:
    ``@label_prior_head.register`` on a function whose argument is annotated with the class of the head.

    Args:
        head: Any head.
    """
    return head if isinstance(head, LabelPriorHead) else None


def label_prior(detector: nn.Module, num_classes: int) -> LabelPrior:
    """Estimate category frequencies and box sizes from the weights of a detector.

    The frequency of a category is its probability according to the biases of the last layers alone, averaged over
    scales and anchors. Box sizes are the anchors of a :class:`LabelPriorHead`. The anchors of other heads form a
    regular grid, which contains no information about the training labels.

    Args:
        detector: In any mode.
        num_classes: Number of categories.

    Returns:
        The statistics that are available, on the CPU.
    """
    for name in CLASS_HEADS:
        head = nested_attribute(detector, name)
        if isinstance(head, nn.ModuleList):
            head = head[-1]
        if isinstance(head, nn.Module):
            return _prior_of_head(head, num_classes)
    return LabelPrior(None, None)


@torch.no_grad()
def _prior_of_head(head: nn.Module, num_classes: int) -> LabelPrior:
    clustered = label_prior_head(head)
    if clustered is None:
        rows = list(_probabilities(head, num_classes))
        sizes = None
    else:
        rows = [_on_cpu(biases).sigmoid() for biases in clustered.class_biases()]
        sizes = _on_cpu(clustered.anchor_sizes())
    return LabelPrior(torch.cat(rows).mean(0) if rows else None, sizes)


def _probabilities(head: Any, num_classes: int) -> Iterator[Tensor]:
    """Yield the category probabilities (anchors, C) of each last layer, computed from its biases."""
    outputs = _class_outputs(head, num_classes)
    anchors = getattr(head, 'num_base_priors', 1)
    anchors = anchors if isinstance(anchors, (list, tuple)) else [anchors]
    # A layer followed by an activation is a hidden layer, whatever its number of outputs.
    hidden = {module.conv for module in head.modules() if isinstance(module, ConvModule) and module.with_activation}
    for name, layer in head.named_modules():
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) or layer.bias is None or layer in hidden:
            continue
        if len(layer.bias) % outputs or 'cls' not in name or len(layer.bias) // outputs not in anchors:
            continue
        logits = _on_cpu(layer.bias).view(-1, outputs)
        yield logits.sigmoid() if outputs == num_classes else logits.softmax(1)[:, :num_classes]


def _class_outputs(head: Any, num_classes: int) -> int:
    """Return the number of class outputs per anchor or region, including the background class of a softmax."""
    outputs = getattr(head, 'cls_out_channels', None)
    if outputs in (num_classes, num_classes + 1):
        return int(outputs)
    return num_classes + (not getattr(getattr(head, 'loss_cls', None), 'use_sigmoid', True))


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()
