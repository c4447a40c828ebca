# SPDX-License-Identifier: Apache-2.0
"""Adaptive label sampling: the teacher corrects random labels while the images are optimized.

As an image is optimized towards its labels, objects appear that no label describes, and some labeled objects do not
appear. At regular intervals the teacher predicts on the un-augmented image. Confident predictions are added to the
labels, and labels that the teacher does not detect are removed (section 3.2 and Algorithm 1 of the paper).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image

from mmzsq.argument_checks import checked_integer, checked_number, checked_range
from mmzsq.boxes import box_area, pairwise_iou
from mmzsq.errors import UserError
from mmzsq.registry import LABEL_SAMPLERS, build_part
from mmzsq.synthesis.label_samplers.base import (
    LabelPrior,
    LabelSampler,
    RelabelCounts,
)


def best_iou(bboxes: Tensor, others: Tensor) -> Tensor:
    """Return the highest IoU of each box with any of ``others``, regardless of class.

    Args:
        bboxes: Boxes (n, 4), xyxy.
        others: Boxes (m, 4), xyxy; m may be 0.

    Returns:
        Shape (n,), in [0, 1]; 0 if there are no others.
    """
    # The added column of zeros never changes a maximum, and provides one if there are no others.
    return F.pad(pairwise_iou(bboxes, others), (0, 1)).amax(dim=1)


def new_predictions(
    predicted: Tensor,
    current: Tensor,
    image_size: tuple[int, int],
    iou: float,
    area: tuple[float, float],
) -> Tensor:
    """Find the predictions that the labels lack.

    Args:
        predicted: Boxes (p, 4), xyxy in pixels.
        current: Boxes (n, 4) of the labels, xyxy in pixels.
        image_size: Height and width in pixels.
        iou: A prediction counts as labeled if its IoU with any current box is at least this.
        area: Open interval, as fractions of the image area. Predictions outside of it are treated as noise.

    Returns:
        Mask (p,), bool.
    """
    fraction = box_area(predicted) / (image_size[0] * image_size[1])
    return (best_iou(predicted, current) < iou) & (fraction > area[0]) & (fraction < area[1])


def undetected_labels(current: Tensor, predicted: Tensor, iou: float) -> Tensor:
    """Find the labels that the detector does not predict, but never all of them.

    Args:
        current: Boxes (n, 4) of the labels, xyxy in pixels.
        predicted: Boxes (p, 4), xyxy in pixels.
        iou: A label counts as detected if its IoU with any prediction is at least this.

    Returns:
        Mask (n,), bool. All False if the image has only one box, or if nothing is predicted: a detector that finds
        nothing gives no information about the labels. If no label is detected, the one with the highest IoU is kept.
    """
    if len(current) <= 1 or len(predicted) == 0:
        return torch.zeros(len(current), dtype=torch.bool)
    overlap = best_iou(current, predicted)
    undetected = overlap < iou
    if undetected.all():
        undetected[overlap.argmax()] = False
    return undetected


@LABEL_SAMPLERS.register_module()
class AdaptiveLabelSampler(LabelSampler):
    """Starts with the labels of another sampler and corrects them by the teacher's predictions.

    Detected labels keep their class and their box. The paper's non-maximum suppression also has a score threshold
    (0.001) below ``score_thr``. It has no effect, because only boxes with higher scores suppress a box.

    Args:
        start: Config of the sampler that draws the initial labels.
        warmup: Optimization steps before the first correction.
        interval: Optimization steps between two corrections.
        score_thr: Predictions with lower or equal scores are ignored, in [0, 1].
        nms_iou: If two predictions of one class have a higher IoU, the one with the lower score is dropped.
        add_iou: A prediction is added if its IoU with every current box, of any class, is lower.
        remove_iou: A current box is removed if its IoU with every prediction, of any class, is lower.
        area: A prediction is added only if its area, as a fraction of the image area, is strictly between these.

    Raises:
        UserError: If an argument is out of range, or ``start`` is itself adaptive.
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
        self.warmup = checked_integer(f'{name}: warmup', warmup, 0)
        self.interval = checked_integer(f'{name}: interval', interval, 1)
        self.score_thr = checked_number(f'{name}: score_thr', score_thr, 0, 1)
        self.nms_iou = checked_number(f'{name}: nms_iou', nms_iou, 0, 1)
        self.add_iou = checked_number(f'{name}: add_iou', add_iou, 0, 1)
        self.remove_iou = checked_number(f'{name}: remove_iou', remove_iou, 0, 1)
        self.area = checked_range(f'{name}: area', area, 0, 1)

    def set_label_prior(self, prior: LabelPrior, image_size: tuple[int, int]) -> None:
        """Pass the label statistics to the initial sampler; see :meth:`LabelSampler.set_label_prior`."""
        self.start.set_label_prior(prior, image_size)

    def sample(
        self,
        num_images: int,
        image_size: tuple[int, int],
        num_classes: int,
        generator: torch.Generator,
    ) -> list[InstanceData]:
        """Draw the initial labels; see :meth:`LabelSampler.sample`."""
        return self.start.sample(num_images, image_size, num_classes, generator)

    def should_relabel(self, iteration: int) -> bool:
        """Return whether to relabel after ``iteration`` steps: after ``warmup``, then every ``interval``."""
        return iteration >= self.warmup and (iteration - self.warmup) % self.interval == 0

    def relabel(
        self,
        labels: Sequence[InstanceData],
        predictions: Sequence[InstanceData],
        image_size: tuple[int, int],
    ) -> tuple[list[InstanceData], RelabelCounts]:
        """Add predictions that the labels lack, and remove labels that are not predicted.

        See :meth:`LabelSampler.relabel`. Both decisions compare with the labels passed in. In the result, boxes that
        stay come first, in their order, followed by the added ones by descending score.
        """
        relabeled = []
        added = removed = 0
        for current, predicted in zip(labels, predictions, strict=True):
            confident = self.confident(predicted, image_size)
            new = new_predictions(confident.bboxes, current.bboxes, image_size, self.add_iou, self.area)
            if 'masks' in confident:
                # A mask head cannot learn a box without a pixel of its object.
                new &= confident.masks.flatten(1).any(dim=1)
            undetected = undetected_labels(current.bboxes, confident.bboxes, self.remove_iou)
            relabeled.append(_concatenate(current[~undetected], confident[new]))
            added += int(new.sum())
            removed += int(undetected.sum())
        return relabeled, RelabelCounts(added, removed)

    def confident(self, predictions: InstanceData, image_size: tuple[int, int]) -> InstanceData:
        """Return the confident predictions, by descending score.

        Args:
            predictions: Predictions for one image, as in :meth:`LabelSampler.relabel`.
            image_size: Height and width in pixels.

        Returns:
            Predictions above the score threshold that survive class-wise non-maximum suppression, on the CPU, clipped
            to the image.
        """
        confident = predictions.to('cpu')
        confident = confident[confident.scores > self.score_thr]
        confident.bboxes = clip_boxes_to_image(confident.bboxes.float(), image_size)
        # batched_nms separates classes by adding offsets to the boxes, which costs precision unless in float64.
        keep = batched_nms(confident.bboxes.double(), confident.scores.double(), confident.labels, self.nms_iou)
        return confident[keep]


def _concatenate(labels: InstanceData, predictions: InstanceData) -> InstanceData:
    """Concatenate labels and predictions of one image; the result has the fields of the labels."""
    return InstanceData(
        **{name: torch.cat([value, predictions[name].to(value.dtype)]) for name, value in labels.items()}
    )
