# SPDX-License-Identifier: Apache-2.0
"""The training loss of a one-stage detector as one computation over a batch, which never waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mmzsq.models.train_eval_modes import frozen_train_mode
from mmzsq.tasks.detection_task import DetectionTask
from mmzsq.tasks.one_stage.support import FAMILIES


@dataclass
class OneStageSamples:
    """The labels of N images, on the device.

    Attributes:
        labels: One entry an image: ``bboxes`` (n, 4), xyxy in pixels, ``labels`` (n,).
        image_size: Height and width in pixels.
        map_sizes: Rows and columns of the head's maps; known from the first loss on.
        targets: What the head is to learn; made by the first loss.
    """

    labels: list[InstanceData]
    image_size: tuple[int, int]
    map_sizes: list[tuple[int, int]] | None = None
    targets: Any = None


class OneStageTask(DetectionTask):
    """A one-stage detector as synthesis sees it, with a loss of fixed shapes.

    It stands for ``SingleStageDetector.loss``: the sum of the same terms for the same places. With several processes,
    each divides by the places of its own images, where MMDetection takes the mean over the processes.

    Args:
        detector: A detector that :func:`~mmzsq.tasks.one_stage.unsupported_reason` accepts; set to eval mode, frozen.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__(detector)
        self._family = FAMILIES[type(self.detector.bbox_head)]

    def data_samples(self, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> Any:
        """Put labels on the detector's device as :meth:`loss` takes them.

        Args:
            labels: One entry an image; ``bboxes`` (n, 4) xyxy in pixels of the image, ``labels`` (n,).
            image_size: Height and width in pixels.

        Returns:
            The :class:`OneStageSamples`.
        """
        return OneStageSamples(self._on_device(labels), image_size)

    def update_samples(self, samples: Any, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> bool:
        """Write ``labels`` into ``samples`` if they have room; see :meth:`DetectionTask.update_samples`."""
        if samples.targets is None or samples.image_size != image_size:
            return False
        on_device = self._on_device(labels)
        old = tree_leaves(samples.targets)
        new = tree_leaves(self._assign(on_device, samples.map_sizes, image_size))
        pairs = [(was, now) for was, now in zip(old, new, strict=True) if isinstance(was, Tensor)]
        if any(was.shape != now.shape for was, now in pairs):
            return False
        for was, now in pairs:
            was.copy_(now)
        samples.labels = on_device
        return True

    def loss(self, images: Tensor, samples: Any) -> Tensor:
        """Return the training loss for ``images`` (N, 3, H, W) in [0, 1], a scalar.

        Args:
            images: As in the base class.
            samples: From :meth:`data_samples`.
        """
        head = self.detector.bbox_head
        with frozen_train_mode(self.detector):
            maps = head(self.detector.extract_feat(self.normalize(images)))
        if samples.targets is None:
            samples.map_sizes = [(level.shape[2], level.shape[3]) for level in maps[0]]
            samples.targets = self._assign(samples.labels, samples.map_sizes, samples.image_size)
        return self._family.loss(head, maps, samples.targets)

    def _on_device(self, labels: Sequence[InstanceData]) -> list[InstanceData]:
        return [
            InstanceData(bboxes=entry.bboxes.to(self.device), labels=entry.labels.to(self.device)) for entry in labels
        ]

    @torch.no_grad()
    def _assign(self, labels: list[InstanceData], map_sizes: Any, image_size: tuple[int, int]) -> Any:
        return self._family.assign(self.detector.bbox_head, labels, map_sizes, image_size)
