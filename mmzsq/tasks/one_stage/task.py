# SPDX-License-Identifier: Apache-2.0
"""Batched training loss of one-stage detectors, in which the host never waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from mmzsq.models.train_eval_modes import frozen_train_mode
from mmzsq.tasks.detection_task import DetectionTask
from mmzsq.tasks.one_stage.support import BatchedLoss, batched_loss_of


@dataclass
class OneStageSamples:
    """Labels of N images, on the device.

    Attributes:
        labels: One entry per image with ``bboxes`` (n, 4) in xyxy pixels and ``labels`` (n,).
        image_size: Height and width in pixels.
        map_sizes: Rows and columns of the head's maps; None before the first call of the loss.
        targets: Targets of the head; None before the first call of the loss.
    """

    labels: list[InstanceData]
    image_size: tuple[int, int]
    map_sizes: list[tuple[int, int]] | None = None
    targets: Any = None


class OneStageTask(DetectionTask):
    """Task of a one-stage detector, with a loss of fixed shapes.

    The loss equals ``SingleStageDetector.loss``: the sum of the same terms over the same locations. With several
    processes, each process divides by the number of positive locations in its own images, whereas MMDetection averages
    this number over the processes.

    Args:
        detector: A detector that :func:`~mmzsq.tasks.one_stage.unsupported_reason` accepts. It is set to eval mode and
            frozen.
    """

    is_batched = True

    def __init__(self, detector: nn.Module) -> None:
        super().__init__(detector)
        batched_loss = batched_loss_of(type(self.detector.bbox_head))
        assert batched_loss is not None
        self._batched_loss: BatchedLoss = batched_loss

    def data_samples(self, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> Any:
        """Move labels to the detector's device, in the form that :meth:`loss` takes.

        Args:
            labels: One entry per image with ``bboxes`` (n, 4) in xyxy pixels of the image and ``labels`` (n,).
            image_size: Height and width in pixels.

        Returns:
            A :class:`OneStageSamples`.
        """
        return OneStageSamples(self._on_device(labels), image_size)

    def update_samples(self, samples: Any, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> bool:
        """Write ``labels`` into ``samples`` if they fit; see :meth:`DetectionTask.update_samples`."""
        if samples.targets is None or samples.image_size != image_size:
            return False
        on_device = self._on_device(labels)
        # Not tree_leaves, which torch 2.1 lacks.
        old, _ = tree_flatten(samples.targets)
        new, _ = tree_flatten(self._assign(on_device, samples.map_sizes, image_size))
        pairs = [(was, now) for was, now in zip(old, new, strict=True) if isinstance(was, Tensor)]
        if any(was.shape != now.shape for was, now in pairs):
            return False
        for was, now in pairs:
            was.copy_(now)
        samples.labels = on_device
        return True

    def loss(self, images: Tensor, samples: Any) -> Tensor:
        """Compute the training loss.

        Args:
            images: Shape (N, 3, H, W), in [0, 1].
            samples: Return value of :meth:`data_samples`.

        Returns:
            A scalar.
        """
        head = self.detector.bbox_head
        with frozen_train_mode(self.detector):
            maps = head(self.detector.extract_feat(self.normalize(images)))
        if samples.targets is None:
            samples.map_sizes = [(level.shape[2], level.shape[3]) for level in maps[0]]
            samples.targets = self._assign(samples.labels, samples.map_sizes, samples.image_size)
        return self._batched_loss.loss(head, maps, samples.targets)

    def _on_device(self, labels: Sequence[InstanceData]) -> list[InstanceData]:
        return [
            InstanceData(bboxes=entry.bboxes.to(self.device), labels=entry.labels.to(self.device)) for entry in labels
        ]

    @torch.no_grad()
    def _assign(self, labels: list[InstanceData], map_sizes: Any, image_size: tuple[int, int]) -> Any:
        return self._batched_loss.assign(self.detector.bbox_head, labels, map_sizes, image_size)
