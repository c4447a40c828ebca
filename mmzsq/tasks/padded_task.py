# SPDX-License-Identifier: Apache-2.0
"""The detection loss of heads that take padded targets: new labels go into the tensors of the old ones.

A captured CUDA graph reads its targets at fixed addresses in fixed shapes. With room to spare, corrected labels are
written there and the graph goes on; capturing anew takes as long as many steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.models.padded_targets import PaddedTargets, pad_targets
from mmzsq.tasks.detection_task import DetectionTask, sum_losses

PAD_MULTIPLE = 16
"""Targets an image are padded to a multiple of this."""


def takes_padded_targets(detector: nn.Module) -> bool:
    """Whether the loss of ``detector`` is that of its head's ``loss_by_targets``."""
    return hasattr(getattr(detector, 'bbox_head', None), 'loss_by_targets')


def _padded_length(instances: Sequence[InstanceData]) -> int:
    """The least multiple of :data:`PAD_MULTIPLE` that has room for the targets of each image."""
    return -(-max(len(image) for image in instances) // PAD_MULTIPLE) * PAD_MULTIPLE


class TargetCapacity:
    """How many targets an image are padded to: more are made room for until what reads them is fixed.

    Attributes:
        targets: That number, a multiple of :data:`PAD_MULTIPLE`.
    """

    def __init__(self) -> None:
        self.targets = 2 * PAD_MULTIPLE

    def pad(self, instances: Sequence[InstanceData], fixed: bool) -> PaddedTargets:
        """Pad the targets of a batch, as :func:`~mmzsq.models.padded_targets.pad_targets` does.

        Args:
            instances: One entry an image; ``bboxes`` (n, 4) xyxy in pixels, ``labels`` (n,).
            fixed: Whether the number stays, and a batch that wants more gets a shape of its own.
        """
        wanted = max(self.targets, _padded_length(instances))
        if not fixed:
            self.targets = wanted
        return pad_targets(instances, wanted)


class PaddedTargetsTask(DetectionTask):
    """A detector whose ``bbox_head`` has ``loss_by_targets(maps, PaddedTargets)``; see :class:`DetectionTask`."""

    def data_samples(self, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> PaddedTargets:  # type: ignore[override]
        """Pad labels to a common length, on the detector's device.

        Args:
            labels: One entry an image; ``bboxes`` (n, 4) xyxy in pixels of the image, ``labels`` (n,).
            image_size: Not used.
        """
        return pad_targets([instances.to(self.device) for instances in labels], _padded_length(labels))

    def update_samples(
        self, samples: PaddedTargets, labels: Sequence[InstanceData], image_size: tuple[int, int]
    ) -> bool:
        """Write ``labels`` into ``samples`` if they have room; see :meth:`DetectionTask.update_samples`."""
        new = self.data_samples(labels, image_size)
        if new.labels.shape != samples.labels.shape:
            return False
        for target, value in zip(samples, new, strict=True):
            target.copy_(value)
        return True

    def loss(self, images: Tensor, samples: PaddedTargets) -> Tensor:  # type: ignore[override]
        """Return the detector's own training loss for ``images`` (N, 3, H, W) in [0, 1], a scalar."""
        (maps,) = self.detector.bbox_head(self.detector.extract_feat(self.normalize(images)))
        return sum_losses(self.detector.bbox_head.loss_by_targets(maps, samples))
