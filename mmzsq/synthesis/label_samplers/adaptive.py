# SPDX-License-Identifier: Apache-2.0
"""Adaptive label sampling: the teacher corrects random labels by what it sees grow in the images.

While an image is optimized towards its labels, objects appear that no label asked for, and some
that were asked for do not come. Every so often the teacher looks at the un-augmented image; what it
is sure of joins the labels, and labels it does not see go (the paper's section 3.3; FACTS.md
section 3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms, box_area, box_iou, clip_boxes_to_image

from mmzsq.errors import UserError
from mmzsq.registry import LABEL_SAMPLERS, build_part
from mmzsq.synthesis.label_samplers.base import (
    LabelSampler,
    RelabelCounts,
    checked_number,
    checked_range,
)
from mmzsq.synthesis.label_samplers.detector_prior import LabelPrior


def best_iou(bboxes: Tensor, others: Tensor) -> Tensor:
    """Highest IoU of each box with any of ``others``, whatever their classes.

    Args:
        bboxes: Boxes (n, 4), xyxy.
        others: Boxes (m, 4), xyxy; m may be 0.

    Returns:
        Shape (n,), in [0, 1]; 0 if there are no others.
    """
    # The column of zeros changes no maximum, and is one where there are no others.
    return F.pad(box_iou(bboxes, others), (0, 1)).amax(dim=1)


def new_predictions(
    predicted: Tensor,
    current: Tensor,
    image_size: tuple[int, int],
    iou: float,
    area: tuple[float, float],
) -> Tensor:
    """Which predictions the labels lack.

    Args:
        predicted: Boxes (p, 4), xyxy in pixels.
        current: Boxes (n, 4) of the labels, xyxy in pixels.
        image_size: Height and width in pixels.
        iou: A prediction that overlaps any current box by this much or more is labeled.
        area: Open interval, as share of the image; smaller and larger predictions are noise.

    Returns:
        Mask (p,), bool.
    """
    share = box_area(predicted) / (image_size[0] * image_size[1])
    return (best_iou(predicted, current) < iou) & (share > area[0]) & (share < area[1])


def undetected_labels(current: Tensor, predicted: Tensor, iou: float) -> Tensor:
    """Which labels the detector does not see, but never all of them.

    Args:
        current: Boxes (n, 4) of the labels, xyxy in pixels.
        predicted: Boxes (p, 4), xyxy in pixels.
        iou: A label that overlaps any prediction by this much or more is seen.

    Returns:
        Mask (n,), bool. All False if the image has one box, or nothing is predicted: a detector
        that sees nothing says nothing about the labels. If no label is seen, the best-overlapping
        one stays.
    """
    if len(current) <= 1 or len(predicted) == 0:
        return torch.zeros(len(current), dtype=torch.bool)
    overlap = best_iou(current, predicted)
    gone = overlap < iou
    if gone.all():
        gone[overlap.argmax()] = False
    return gone


def match_labels(current: Tensor, predicted: Tensor, iou: float) -> tuple[Tensor, Tensor]:
    """Pair labels with what the detector sees in their place, each label and each prediction once, the closest first.

    Args:
        current: Boxes (n, 4) of the labels, xyxy in pixels.
        predicted: Boxes (p, 4), xyxy in pixels.
        iou: Pairs overlap by this much or more.

    Returns:
        Indices of the labels and of their predictions, (m,) each, by rising index of the label.
    """
    overlap = box_iou(current, predicted)
    pairs: dict[int, int] = {}
    for pair in overlap.flatten().argsort(descending=True, stable=True).tolist():
        label, prediction = divmod(pair, len(predicted))
        if overlap[label, prediction] < iou:
            break
        if label not in pairs and prediction not in pairs.values():
            pairs[label] = prediction
    labels = sorted(pairs)
    return torch.tensor(labels, dtype=torch.long), torch.tensor([pairs[label] for label in labels], dtype=torch.long)


@LABEL_SAMPLERS.register_module()
class AdaptiveLabelSampler(LabelSampler):
    """Starts from another sampler's labels and corrects them by the teacher's predictions.

    Labels that the teacher sees keep their class and their place. The paper's non-maximum
    suppression also has a score threshold (0.001) below ``score_thr``; it changes nothing, since a
    box is suppressed by higher scores only.

    Args:
        start: Config of the sampler to start from.
        warmup: Steps of optimization before the first correction.
        interval: Steps between two corrections.
        score_thr: Predictions count above this score, in [0, 1].
        nms_iou: Of two predictions of one class that overlap by more, the lower-scoring one is
            dropped.
        add_iou: Predictions are added that overlap every current box, of any class, by less.
        remove_iou: Current boxes are removed that overlap every prediction, of any class, by less.
        area: Only predictions of an area strictly between these shares of the image are added.
        adopt: Whether labels that the teacher sees become what it sees: its box, class and mask in place of those that
            were drawn, each prediction for one label. In the paper they stay. Where sizes and classes go together, as
            with cells, those drawn apart ask for objects that no image can hold.

    Raises:
        UserError: If an argument is out of range, or ``start`` is adaptive itself.
    """

    adaptive = True

    def __init__(
        self,
        start: dict[str, Any] | None = None,
        warmup: int = 800,
        interval: int = 100,
        score_thr: float = 0.2,
        nms_iou: float = 0.6,
        add_iou: float = 0.35,
        remove_iou: float = 0.35,
        area: Sequence[float] = (0.01, 0.85),
        adopt: bool = False,
    ) -> None:
        name = type(self).__name__
        self.start: LabelSampler = build_part(
            LABEL_SAMPLERS, start or {'type': 'mmzsq.SingleBoxSampler'}, 'zsq.label_sampler.start'
        )
        if self.start.adaptive:
            raise UserError(
                f'{name}: start must be a sampler that is not adaptive, for example '
                f"dict(type='mmzsq.SingleBoxSampler'), got {type(self.start).__name__}"
            )
        self.uses_real_labels = self.start.uses_real_labels
        self.uses_detector_prior = self.start.uses_detector_prior
        self.warmup = checked_number(f'{name}: warmup', warmup, 0, math.inf)
        self.interval = checked_number(f'{name}: interval', interval, 1, math.inf)
        self.score_thr = checked_number(f'{name}: score_thr', score_thr, 0, 1)
        self.nms_iou = checked_number(f'{name}: nms_iou', nms_iou, 0, 1)
        self.add_iou = checked_number(f'{name}: add_iou', add_iou, 0, 1)
        self.remove_iou = checked_number(f'{name}: remove_iou', remove_iou, 0, 1)
        self.area = checked_range(f'{name}: area', area, 0, 1)
        if not isinstance(adopt, bool):
            raise UserError(f'{name}: adopt must be True or False, got {adopt!r}')
        self.adopt = adopt

    def set_label_prior(self, prior: LabelPrior, image_size: tuple[int, int]) -> None:
        """Pass it on to the start; see :meth:`LabelSampler.set_label_prior`."""
        self.start.set_label_prior(prior, image_size)

    def sample(
        self,
        num_images: int,
        image_size: tuple[int, int],
        num_classes: int,
        generator: torch.Generator,
    ) -> list[InstanceData]:
        """Draw the start; see :meth:`LabelSampler.sample`."""
        return self.start.sample(num_images, image_size, num_classes, generator)

    def due(self, iteration: int) -> bool:
        """Whether to relabel after ``iteration`` steps: at ``warmup``, then every ``interval``."""
        return iteration >= self.warmup and (iteration - self.warmup) % self.interval == 0

    def relabel(
        self,
        labels: Sequence[InstanceData],
        predictions: Sequence[InstanceData],
        image_size: tuple[int, int],
    ) -> tuple[list[InstanceData], RelabelCounts]:
        """Add what the detector sees and the labels lack, remove what it does not see.

        See :meth:`LabelSampler.relabel`. Both decisions are taken against the labels as they come
        in. Boxes that stay come first, in their order; then those added, by falling score. A pair that
        ``adopt`` joins overlaps by ``add_iou`` or more, so that no prediction is both added and adopted.
        """
        relabeled = []
        added = removed = adopted = 0
        for current, predicted in zip(labels, predictions, strict=True):
            seen = self.confident(predicted, image_size)
            new = new_predictions(seen.bboxes, current.bboxes, image_size, self.add_iou, self.area)
            # A box without a pixel of its object is no label for a mask head.
            whole = seen.masks.flatten(1).any(dim=1) if 'masks' in seen else torch.ones_like(new)
            new &= whole
            gone = undetected_labels(current.bboxes, seen.bboxes, self.remove_iou)
            if self.adopt:
                place, source = match_labels(current.bboxes, seen.bboxes, self.add_iou)
                place, source = place[whole[source]], source[whole[source]]
                adopted += _differing(current[place], seen[source])
                current = _replaced(current, place, seen[source])
            relabeled.append(_concatenate(current[~gone], seen[new]))
            added += int(new.sum())
            removed += int(gone.sum())
        return relabeled, RelabelCounts(added, removed, adopted)

    def confident(self, predictions: InstanceData, image_size: tuple[int, int]) -> InstanceData:
        """Return the predictions that count, by falling score.

        Args:
            predictions: Of one image, as in :meth:`LabelSampler.relabel`.
            image_size: Height and width in pixels.

        Returns:
            Those above the score threshold that survive class-wise non-maximum suppression, on the
            CPU, clipped to the image.
        """
        confident = predictions.to('cpu')
        confident = confident[confident.scores > self.score_thr]
        confident.bboxes = clip_boxes_to_image(confident.bboxes.float(), image_size)
        # It tells classes apart by offsets added to the boxes: in doubles these cost no precision.
        keep = batched_nms(confident.bboxes.double(), confident.scores.double(), confident.labels, self.nms_iou)
        return confident[keep]


def _concatenate(labels: InstanceData, predictions: InstanceData) -> InstanceData:
    """Labels and predictions of one image in the fields of the labels."""
    return InstanceData(
        **{name: torch.cat([value, predictions[name].to(value.dtype)]) for name, value in labels.items()}
    )


def _replaced(labels: InstanceData, place: Tensor, predictions: InstanceData) -> InstanceData:
    """Labels of one image with those at ``place`` replaced, in the fields of the labels; the others stay."""
    return InstanceData(
        **{name: value.index_copy(0, place, predictions[name].to(value.dtype)) for name, value in labels.items()}
    )


def _differing(labels: InstanceData, predictions: InstanceData) -> int:
    """How many of the labels are of another class or box than the predictions beside them."""
    same = (labels.labels == predictions.labels) & (labels.bboxes == predictions.bboxes).all(dim=1)
    return int((~same).sum())
