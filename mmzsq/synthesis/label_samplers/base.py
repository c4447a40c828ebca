# SPDX-License-Identifier: Apache-2.0
"""Interface of label samplers, and functions on labels.

Labels are a list of :class:`mmengine.structures.InstanceData` on the CPU, one entry for each image, never empty:
``bboxes`` (n, 4) float32, xyxy in pixels of the image, ``labels`` (n,) int64, and, for detectors that learn masks,
``masks`` (n, H, W) bool.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.masks import ellipse_masks, resize_masks


@dataclass(frozen=True)
class LabelPrior:
    """Label statistics of a detector's training data, estimated from its weights.

    Attributes:
        categories: Weight of each category, (C,), positive; None if the weights do not reveal any.
        sizes: Widths and heights in pixels, all equally likely, (K, 2); None if the weights do not reveal any.
    """

    categories: Tensor | None
    sizes: Tensor | None


@dataclass(frozen=True)
class RelabelCounts:
    """Number of boxes changed by one :meth:`LabelSampler.relabel`, over all images.

    Attributes:
        added: Boxes that the detector predicted and the labels lacked.
        removed: Boxes of the labels that the detector did not predict.
    """

    added: int = 0
    removed: int = 0

    @property
    def any(self) -> bool:
        """Whether any label changed."""
        return bool(self.added or self.removed)


class LabelSampler(ABC):
    """Draws the labels of synthetic images.

    Attributes:
        adaptive: Whether :meth:`relabel` can change labels while the images are optimized.
        uses_real_labels: Whether any label of a real image is read. Such a run is not zero-shot.
        uses_detector_prior: Whether :meth:`set_label_prior` must be called before :meth:`sample`.
    """

    adaptive: bool = False
    uses_real_labels: bool = False
    uses_detector_prior: bool = False

    def set_label_prior(self, prior: LabelPrior, image_size: tuple[int, int]) -> None:
        """Set the label statistics of the detector; ignored unless :attr:`uses_detector_prior` is true.

        Args:
            prior: Label statistics of the detector.
            image_size: Height and width, in pixels, of the images that ``prior.sizes`` refers to.
        """
        return None

    @abstractmethod
    def sample(
        self,
        num_images: int,
        image_size: tuple[int, int],
        num_classes: int,
        generator: torch.Generator,
    ) -> list[InstanceData]:
        """Draw the initial labels.

        Args:
            num_images: Length of the returned list.
            image_size: Height and width in pixels.
            num_classes: Classes are drawn from ``range(num_classes)``.
            generator: CPU generator, the only source of randomness: the same state gives the same labels.

        Returns:
            The labels, in the format described at the top of this module.
        """

    def should_relabel(self, iteration: int) -> bool:
        """Return whether to relabel after ``iteration`` steps; False unless overridden."""
        return False

    def relabel(
        self,
        labels: Sequence[InstanceData],
        predictions: Sequence[InstanceData],
        image_size: tuple[int, int],
    ) -> tuple[list[InstanceData], RelabelCounts]:
        """Correct labels by the predictions of a detector; changes nothing unless overridden.

        Args:
            labels: The current labels; not modified.
            predictions: One entry for each image: ``bboxes`` (p, 4) xyxy in the same pixels, ``scores`` (p,) in [0, 1],
                ``labels`` (p,), and ``masks`` (p, H, W) if the labels have masks. Not modified.
            image_size: Height and width in pixels.

        Returns:
            The new labels, and the number of boxes added and removed.
        """
        return list(labels), RelabelCounts()


def rescale_labels(
    labels: Sequence[InstanceData], from_size: tuple[int, int], to_size: tuple[int, int]
) -> list[InstanceData]:
    """Rescale labels to another image size.

    Args:
        labels: Labels of images of ``from_size``; not modified.
        from_size: Height and width in pixels.
        to_size: Height and width in pixels.

    Returns:
        Labels of images of ``to_size``; masks are resized by :func:`~mmzsq.masks.resize_masks`.

    Example:
        >>> labels = [InstanceData(bboxes=torch.tensor([[0., 0., 10., 20.]]))]
        >>> rescale_labels(labels, (20, 20), (40, 80))[0].bboxes
        tensor([[ 0.,  0., 40., 40.]])
    """
    y, x = to_size[0] / from_size[0], to_size[1] / from_size[1]
    scale = torch.tensor([x, y, x, y])
    rescaled = []
    for instances in labels:
        new = instances.clone()
        new.bboxes = instances.bboxes * scale
        if 'masks' in instances:
            new.masks = resize_masks(instances.masks, to_size)
        rescaled.append(new)
    return rescaled


def fit_masks(labels: Sequence[InstanceData], image_size: tuple[int, int], needed: bool) -> list[InstanceData]:
    """Add masks to labels, or remove them, to match the detector.

    Args:
        labels: Labels of images of ``image_size``; not modified.
        image_size: Height and width in pixels.
        needed: Whether the detector learns masks.

    Returns:
        The labels. With ``needed``, labels without masks get ellipses, and other masks are kept; else there are none.
    """
    fitted = []
    for instances in labels:
        new = instances.clone()
        if not needed:
            new.pop('masks', None)
        elif 'masks' not in instances:
            new.masks = ellipse_masks(instances.bboxes, image_size)
        fitted.append(new)
    return fitted
