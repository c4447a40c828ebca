# SPDX-License-Identifier: Apache-2.0
"""Calibration sets of procedural pictures, and of synthesized images and pictures.

A picture depends only on the seed of the set and on its own index. Any number of processes, in any order, therefore
generate the same set.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.structures import InstanceData
from torchvision.ops import clip_boxes_to_image

from mmzsq.synthesis.calibration_set import CalibrationSet
from mmzsq.synthesis.generator import CalibrationSetGenerator, Stage, to_images
from mmzsq.synthesis.procedural import PICTURES_VERSION, draw_pictures, picture_seed
from mmzsq.synthesis.synthesizer import StepProgress, SynthesisTask

PICTURES_IN_SHARD = 32

PREDICTED_TOGETHER = 8
"""Pictures that the teacher labels together."""


class PictureLabels:
    """Labels pictures by the predictions of a detector.

    Args:
        task: The frozen detector.
        score_thr: Predictions with a lower score are dropped.
    """

    def __init__(self, task: SynthesisTask, score_thr: float) -> None:
        self.task = task
        self.score_thr = score_thr

    @torch.no_grad()
    def __call__(self, pictures: np.ndarray) -> list[InstanceData]:
        """Return labels (``bboxes`` in pixels, ``labels``, ``masks`` of detectors that predict them).

        Args:
            pictures: (n, H, W, 3), uint8, RGB.
        """
        labels = []
        for first in range(0, len(pictures), PREDICTED_TOGETHER):
            for found in self.task.predict(to_images(pictures[first : first + PREDICTED_TOGETHER], self.task)):
                found.bboxes = clip_boxes_to_image(found.bboxes, pictures.shape[1:3])
                sides = found.bboxes[:, 2:] - found.bboxes[:, :2]
                kept = found[(found.scores >= self.score_thr) & (sides >= 1).all(1)]
                del kept.scores
                labels.append(kept)
        return labels


def no_labels(pictures: np.ndarray) -> list[InstanceData]:
    """Return empty labels of pictures (n, H, W, 3)."""
    return [
        InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)) for _ in range(len(pictures))
    ]


class ProceduralGenerator:
    """Generates shards of procedural pictures.

    Args:
        image_size: Height and width of the pictures in pixels.
        seed: Seed of the set.
        label: Labels pictures (n, H, W, 3), uint8, RGB. By default, they get no labels.
        processes: As of :func:`~mmzsq.synthesis.procedural.draw_pictures`.
    """

    shard_size = PICTURES_IN_SHARD
    uses_real_labels = False

    def __init__(
        self,
        image_size: tuple[int, int],
        seed: int,
        label: Callable[[np.ndarray], list[InstanceData]] = no_labels,
        processes: int | None = None,
    ) -> None:
        self.image_size = image_size
        self.seed = seed
        self.label = label
        self.processes = processes

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All values that determine the pictures."""
        return dict(source='procedural', pictures=PICTURES_VERSION, seed=self.seed, image_size=list(self.image_size))

    def draw(self, indices: Sequence[int]) -> Iterator[np.ndarray]:
        """Yield pictures (H, W, 3), uint8, RGB.

        Args:
            indices: Indices in the set.
        """
        return draw_pictures([picture_seed(self.seed, index) for index in indices], *self.image_size, self.processes)

    def generate(
        self,
        calibration_set: CalibrationSet,
        shards: Sequence[int],
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        """Generate shards and write them to a calibration set.

        Args:
            calibration_set: The set, open for writing.
            shards: Indices of the shards.
            on_progress: Called after each shard with its index.

        Raises:
            UserError: If the disk is full or not writable.
        """
        pictures = self.draw([index for shard in shards for index in calibration_set.shard_images(shard)])
        for shard in shards:
            start = time.perf_counter()
            drawn = np.stack([next(pictures) for _ in calibration_set.shard_images(shard)])
            labels = self.label(drawn)
            calibration_set.write_shard(shard, drawn, labels, {'draw': self.measure(time.perf_counter() - start)})
            if on_progress is not None:
                on_progress(shard)

    def measure(self, seconds: float) -> dict[str, Any]:
        """Return the record of a shard with the keys of a synthesis stage.

        Args:
            seconds: Time that drawing took.
        """
        return {
            'image_size': list(self.image_size),
            'iterations': 0,
            'batch_size': 1,
            'seconds': round(seconds, 3),
            'ms_per_image_iteration': 0.0,
            'losses': {},
            'cuda_graph': False,
            'added': 0,
            'removed': 0,
        }


class MixedGenerator:
    """Generates shards in which images with odd indices are procedural pictures, and the others are synthesized.

    Args:
        synthesized: Generator of the synthesized images.
        procedural: Generator of the pictures, of the same size.
    """

    def __init__(self, synthesized: CalibrationSetGenerator, procedural: ProceduralGenerator) -> None:
        self.synthesized = synthesized
        self.procedural = procedural

    @property
    def shard_size(self) -> int:
        """Number of images in a shard: even, and with full batches of synthesized images."""
        return 2 * self.synthesized.shard_size

    def generate(
        self,
        calibration_set: CalibrationSet,
        shards: Sequence[int],
        on_progress: Callable[[int, Stage, StepProgress], None] | None = None,
    ) -> None:
        """Generate shards and write them, see :meth:`CalibrationSetGenerator.generate`."""
        for shard in shards:
            numbers = calibration_set.shard_images(shard)
            images, labels, info = self.synthesized.make_shard(
                shard,
                len(numbers[::2]),
                None if on_progress is None else lambda stage, progress: on_progress(shard, stage, progress),  # noqa: B023
            )
            merged = np.empty((len(numbers), *images.shape[1:]), np.uint8)
            merged[::2] = images
            all_labels: list[InstanceData] = [*labels] * 2
            all_labels = all_labels[: len(numbers)]
            all_labels[::2] = labels
            start = time.perf_counter()
            for place, picture in enumerate(self.procedural.draw(numbers[1::2])):
                merged[2 * place + 1] = picture
            all_labels[1::2] = self.procedural.label(merged[1::2])
            info['draw'] = self.procedural.measure(time.perf_counter() - start)
            calibration_set.write_shard(shard, merged, all_labels, info)
