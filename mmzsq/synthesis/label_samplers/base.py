# SPDX-License-Identifier: Apache-2.0
"""What every label sampler offers, and the form of the labels that it deals in.

Labels are a list of :class:`mmengine.structures.InstanceData` on the CPU, one entry an image, never
empty: ``bboxes`` (n, 4) float32, xyxy in pixels of the image they are meant for, ``labels`` (n,)
int64, and, where the detector learns them, ``masks`` (n, H, W) bool.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from mmengine.structures import InstanceData

from mmzsq.errors import UserError
from mmzsq.synthesis.label_samplers.masks import resize_masks

if TYPE_CHECKING:
    from mmzsq.synthesis.label_samplers.detector_prior import LabelPrior


@dataclass(frozen=True)
class RelabelCounts:
    """How many boxes one :meth:`LabelSampler.relabel` changed, over all images.

    Attributes:
        added: Boxes that the detector saw and the labels lacked.
        removed: Boxes that the labels had and the detector did not see.
        adopted: Boxes that became what the detector saw in their place.
    """

    added: int = 0
    removed: int = 0
    adopted: int = 0

    @property
    def any(self) -> bool:
        """Whether a label changed at all."""
        return bool(self.added or self.removed or self.adopted)


class LabelSampler(ABC):
    """Draws the labels of synthetic images.

    Attributes:
        adaptive: Whether :meth:`relabel` can change labels while the images are optimized.
        uses_real_labels: Whether any label of a real image is read: such a run is not zero-shot.
        uses_detector_prior: Whether :meth:`set_label_prior` has to come before :meth:`sample`.
    """

    adaptive: bool = False
    uses_real_labels: bool = False
    uses_detector_prior: bool = False

    def set_label_prior(self, prior: LabelPrior, image_size: tuple[int, int]) -> None:
        """Learn what the detector's weights tell of labels; of use to samplers that ask for it alone.

        Args:
            prior: Of the detector.
            image_size: Height and width in pixels of the images that its sizes are of.
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
        """Draw the labels to start from.

        Args:
            num_images: Length of the list returned.
            image_size: Height and width in pixels.
            num_classes: Classes are drawn from ``range(num_classes)``.
            generator: A CPU generator, the only source of randomness: one state, one result.

        Returns:
            The labels, in the form that this module describes.
        """

    def due(self, iteration: int) -> bool:
        """Whether to relabel after ``iteration`` steps; never, unless a subclass says so."""
        return False

    def relabel(
        self,
        labels: Sequence[InstanceData],
        predictions: Sequence[InstanceData],
        image_size: tuple[int, int],
    ) -> tuple[list[InstanceData], RelabelCounts]:
        """Correct labels by what a detector sees; changes nothing unless a subclass does.

        Args:
            labels: The current labels; left as they are.
            predictions: One entry an image: ``bboxes`` (p, 4) xyxy in the same pixels, ``scores``
                (p,) in [0, 1], ``labels`` (p,), and ``masks`` (p, H, W) where the labels have them.
                Left as they are.
            image_size: Height and width in pixels.

        Returns:
            The new labels, and how many boxes came and went.
        """
        return list(labels), RelabelCounts()


def rescale_labels(
    labels: Sequence[InstanceData], from_size: tuple[int, int], to_size: tuple[int, int]
) -> list[InstanceData]:
    """Carry labels over to images of another size.

    Args:
        labels: For images of ``from_size``; left as they are.
        from_size: Height and width in pixels.
        to_size: Height and width in pixels.

    Returns:
        Labels for images of ``to_size``; masks as :func:`resize_masks` carries them.

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


def checked_range(name: str, value: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """Return ``value`` as a pair of numbers with ``low <= first <= second <= high``.

    Raises:
        UserError: If it is not; the message names the argument, the value and what is allowed.
    """
    if (
        not isinstance(value, Sequence)
        or len(value) != 2
        or not all(isinstance(bound, (int, float)) for bound in value)
        or not low <= value[0] <= value[1] <= high
    ):
        raise UserError(f'{name} must be two numbers (low, high) with {low} <= low <= high <= {high}, got {value!r}')
    return value[0], value[1]


def checked_number(name: str, value: float, low: float, high: float) -> float:
    """Return ``value`` if it is a number in ``[low, high]``.

    Raises:
        UserError: If it is not; the message names the argument, the value and what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise UserError(f'{name} must be a number in [{low}, {high}], got {value!r}')
    return value


def checked_histogram(name: str, value: Sequence[float] | None) -> list[float] | None:
    """Return ``value`` as a list if it is a list of weights, none below 0 and one above; None stays None.

    Raises:
        UserError: If it is neither; the message names the argument, the value and what is allowed.
    """
    if value is None:
        return None
    if (
        not isinstance(value, Sequence)
        or not all(isinstance(weight, (int, float)) and 0 <= weight < math.inf for weight in value)
        or not any(weight > 0 for weight in value)
    ):
        raise UserError(f'{name} must be a list of weights, none below 0 and one above, got {value!r}')
    return list(value)
