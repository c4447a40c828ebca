# SPDX-License-Identifier: Apache-2.0
"""Collate function for images of a calibration set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.dataset import pseudo_collate
from mmengine.structures import InstanceData
from torch.utils.data import default_collate

from mmzsq.registry import FUNCTIONS

LABELS = ('gt_instances', 'ignored_instances')


@FUNCTIONS.register_module()
def stack_images(batch: Sequence[Any], labels: bool = True) -> dict[str, Any]:
    """Collate a batch by MMEngine's ``pseudo_collate``, and stack images of equal size into one tensor.

    MMEngine transfers images one by one. A single tensor moves from a worker to the main process, and on to the GPU, in
    one transfer, and MMDetection's preprocessor then needs a few kernels for the batch instead of a few for each image.
    The preprocessed images are the same.

    Args:
        batch: Items of the data set, with ``inputs`` (3, H, W) and ``data_samples``.
        labels: Whether to keep the boxes. If False, every image gets an empty ``gt_instances``, which saves the
            transfer of labels that no loss reads.

    Returns:
        ``inputs``: (N, 3, H, W), or a list of (3, H, W) if sizes differ; ``data_samples``: a list.
    """
    data: dict[str, Any] = pseudo_collate(batch)
    if len({(image.shape, image.dtype) for image in data['inputs']}) == 1:
        # In a worker process, default_collate stacks into shared memory.
        data['inputs'] = default_collate(data['inputs'])
    if not labels:
        for sample in data['data_samples']:
            for name in LABELS:
                setattr(sample, name, InstanceData())
    return data
