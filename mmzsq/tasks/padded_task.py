# SPDX-License-Identifier: Apache-2.0
"""Detection task for heads that take padded targets, so that new labels can replace old ones in place.

A captured CUDA graph reads its targets at fixed addresses and in fixed shapes. If the padding leaves room, corrected
labels are written into the same tensors and the graph stays valid. Capturing a graph again takes as long as many steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.models.padded_targets import PaddedTargets, pad_targets
from mmzsq.tasks.detection_task import DetectionTask, sum_losses

PAD_MULTIPLE = 16
"""The number of targets per image is padded to a multiple of this."""


def takes_padded_targets(detector: nn.Module) -> bool:
    """Return whether the head of ``detector`` computes its loss with ``loss_by_targets``."""
    return hasattr(getattr(detector, 'bbox_head', None), 'loss_by_targets')


def _padded_length(instances: Sequence[InstanceData]) -> int:
    """Return the smallest multiple of :data:`PAD_MULTIPLE` that fits the targets of every image."""
    return -(-max(len(image) for image in instances) // PAD_MULTIPLE) * PAD_MULTIPLE


class TargetCapacity:
    """Number of targets per image to pad to, which grows with the batches until a graph is captured.

    Attributes:
        targets: Current number of targets per image, a multiple of :data:`PAD_MULTIPLE`.
    """

    def __init__(self) -> None:
        self.targets = 2 * PAD_MULTIPLE

    def pad(self, instances: Sequence[InstanceData], fixed: bool) -> PaddedTargets:
        """Pad the targets of a batch, as :func:`~mmzsq.models.padded_targets.pad_targets` does.

        Args:
            instances: One entry per image with ``bboxes`` (n, 4) in xyxy pixels and ``labels`` (n,).
            fixed: Whether the capacity must not grow. A batch that needs more is then padded to its own length.
        """
        wanted = max(self.targets, _padded_length(instances))
        if not fixed:
            self.targets = wanted
        return pad_targets(instances, wanted)


class PaddedTargetsTask(DetectionTask):
    """Task of a detector whose ``bbox_head`` has ``loss_by_targets(maps, PaddedTargets)``."""

    is_batched = True

    def data_samples(self, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> PaddedTargets:  # type: ignore[override]
        """Pad labels to a common length, on the detector's device.

        Args:
            labels: One entry per image with ``bboxes`` (n, 4) in xyxy pixels of the image and ``labels`` (n,).
            image_size: Unused.
        """
        return pad_targets([instances.to(self.device) for instances in labels], _padded_length(labels))

    def update_samples(
        self, samples: PaddedTargets, labels: Sequence[InstanceData], image_size: tuple[int, int]
    ) -> bool:
        """Write ``labels`` into ``samples`` if they fit; see :meth:`DetectionTask.update_samples`."""
        new = self.data_samples(labels, image_size)
        if new.labels.shape != samples.labels.shape:
            return False
        for target, value in zip(samples, new, strict=True):
            target.copy_(value)
        return True

    def loss(self, images: Tensor, samples: PaddedTargets) -> Tensor:  # type: ignore[override]
        """Compute the detector's own training loss for ``images`` (N, 3, H, W) in [0, 1], a scalar."""
        (maps,) = self.detector.bbox_head(self.detector.extract_feat(self.normalize(images)))
        return sum_losses(self.detector.bbox_head.loss_by_targets(maps, samples))
