# SPDX-License-Identifier: Apache-2.0
"""A detector as synthesis sees it: a loss for labels, predictions for images, both on images in [0, 1].

Nothing here knows an architecture: the loss is ``detector.loss``, the labels are ``detector.predict``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.errors import UserError


def sum_losses(losses: Mapping[str, Any]) -> Tensor:
    """Sum what MMEngine's ``parse_losses`` would: every value whose key contains ``loss``, lists included."""
    terms: list[Tensor] = []
    for name, value in losses.items():
        if 'loss' in name:
            terms.extend(value if isinstance(value, Sequence) else [value])
    return torch.stack([term.mean() for term in terms]).sum()


def num_classes(detector: nn.Module) -> int:
    """Number of categories that a detector tells apart.

    Raises:
        UserError: If no head has an attribute ``num_classes``.
    """
    for path in ('bbox_head', 'roi_head.bbox_head', 'mask_head'):
        head: Any = detector
        for name in path.split('.'):
            head = getattr(head, name, None)
        if isinstance(head, nn.ModuleList):
            head = head[0]
        if head is not None and hasattr(head, 'num_classes'):
            return int(head.num_classes)
    raise UserError(f'{type(detector).__name__} has no head with `num_classes`: set it on its bbox_head or roi_head')


def data_samples(
    labels: Sequence[InstanceData], image_size: tuple[int, int], device: torch.device
) -> list[DetDataSample]:
    """Wrap labels as MMDetection's detectors take them.

    Args:
        labels: One entry an image; ``bboxes`` (n, 4) xyxy in pixels of the image, ``labels`` (n,).
        image_size: Height and width in pixels.
        device: Where the labels go.
    """
    nothing = no_instances().to(device)
    samples = []
    for instances in labels:
        sample = DetDataSample(
            metainfo=dict(
                img_shape=image_size,
                ori_shape=image_size,
                pad_shape=image_size,
                batch_input_shape=image_size,
                scale_factor=(1.0, 1.0),
                flip=False,
            )
        )
        sample.gt_instances = instances.to(device)
        sample.ignored_instances = nothing
        samples.append(sample)
    return samples


def no_instances() -> InstanceData:
    """Labels of an image without objects."""
    return InstanceData(bboxes=torch.zeros((0, 4)), labels=torch.zeros((0,), dtype=torch.long))


def blank_samples(count: int, image_size: tuple[int, int], device: torch.device) -> list[DetDataSample]:
    """Data samples of ``count`` images of ``image_size`` (height, width) without labels."""
    return data_samples([no_instances()] * count, image_size, device)


class DetectionTask:
    """The full-precision detector and its view of images in [0, 1].

    Args:
        detector: A trained detector; set to eval mode and frozen.
    """

    def __init__(self, detector: nn.Module) -> None:
        self.detector: Any = detector.eval().requires_grad_(False)
        self.num_classes = num_classes(detector)
        preprocessor = detector.data_preprocessor
        # Files hold BGR once OpenCV has read them; the images here are in the order that the network takes.
        self.channel_order = 'rgb' if getattr(preprocessor, '_channel_conversion', False) else 'bgr'
        self._mean, self._std = (
            torch.as_tensor(getattr(preprocessor, name, neutral), device=self.device).float().view(-1, 1, 1)
            for name, neutral in (('mean', 0.0), ('std', 1.0))
        )

    @property
    def device(self) -> torch.device:
        """Where the detector is."""
        return next(self.detector.parameters()).device

    def to_inputs(self, images: Tensor) -> Tensor:
        """Normalise images as the detector's data preprocessor does.

        Args:
            images: Shape (N, 3, H, W), in [0, 1], channels in :attr:`channel_order`.

        Returns:
            What the network takes, the same shape.
        """
        return (images * 255 - self._mean) / self._std

    def data_samples(self, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> list[DetDataSample]:
        """Wrap labels as MMDetection's losses take them, on the detector's device.

        Args:
            labels: One entry an image; ``bboxes`` (n, 4) xyxy in pixels of the image, ``labels`` (n,).
            image_size: Height and width in pixels.
        """
        return data_samples(labels, image_size, self.device)

    def loss(self, images: Tensor, samples: Sequence[DetDataSample]) -> Tensor:
        """Return the detector's own training loss for ``images`` (N, 3, H, W) in [0, 1], a scalar."""
        return sum_losses(self.detector.loss(self.to_inputs(images), samples))

    @torch.no_grad()
    def predict(self, images: Tensor) -> list[InstanceData]:
        """Return what the detector finds, on the CPU: ``bboxes`` (n, 4) xyxy pixels, ``scores``, ``labels`` (n,)."""
        samples = blank_samples(len(images), (images.shape[2], images.shape[3]), self.device)
        results = self.detector.predict(self.to_inputs(images), samples, rescale=False)
        return [result.pred_instances.to('cpu') for result in results]
