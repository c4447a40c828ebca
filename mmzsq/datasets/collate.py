# SPDX-License-Identifier: Apache-2.0
"""How images of a calibration set become a batch."""

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
    """Join images by MMEngine's ``pseudo_collate``, and those of one size into one tensor.

    MMEngine hands images over one by one. One tensor passes from a worker to its process, and on to the GPU, at once,
    and MMDetection's preprocessor changes it by a few kernels instead of a few an image; what comes out is the same.

    Args:
        batch: What the data set returns, ``inputs`` (3, H, W) and ``data_samples``.
        labels: Whether the boxes of the images are kept. Without, each image has an empty ``gt_instances``: nothing is
            passed on that nobody reads.

    Returns:
        ``inputs``: (N, 3, H, W), or a list of (3, H, W) where sizes differ; ``data_samples``: a list.
    """
    data: dict[str, Any] = pseudo_collate(batch)
    if len({(image.shape, image.dtype) for image in data['inputs']}) == 1:
        # In a worker it stacks into shared memory.
        data['inputs'] = default_collate(data['inputs'])
    if not labels:
        for sample in data['data_samples']:
            for name in LABELS:
                setattr(sample, name, InstanceData())
    return data
