# SPDX-License-Identifier: Apache-2.0
"""How YOLO11's raw outputs describe a box: four distributions of distances (Li et al. 2020, arXiv:2006.04388).

A place predicts how far the sides of the box are from its center, each as a distribution over 0, 1, ... cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmdet.models.task_modules.prior_generators import MlvlPointGenerator
from mmdet.structures.bbox import distance2bbox
from torch import Tensor


class RawOutputs(NamedTuple):
    """The raw outputs of P places (scale, row, column; the last is fastest), in float32, and where the places are.

    Attributes:
        distances: Logits of the distances left, top, right and bottom, shape (N, P, 4, R).
        classes: Logits of the classes, shape (N, P, C).
        points: Center of each place, x and y in pixels of the network's input, shape (P, 2).
        strides: Pixels between places of the same scale, shape (P, 1).
    """

    distances: Tensor
    classes: Tensor
    points: Tensor
    strides: Tensor


def split_maps(maps: Sequence[Tensor], generator: MlvlPointGenerator, reg_max: int) -> RawOutputs:
    """Line up the maps of all scales.

    Args:
        maps: Raw outputs of each scale, shape (N, 4*R+C, H, W).
        generator: Makes the places of each scale.
        reg_max: R, the number of distances.
    """
    sizes = [scale_map.shape[-2:] for scale_map in maps]
    priors = torch.cat(generator.grid_priors(sizes, device=maps[0].device, with_stride=True))
    outputs = torch.cat([scale_map.float().flatten(2) for scale_map in maps], dim=2).transpose(1, 2)
    distances, classes = outputs.tensor_split((4 * reg_max,), dim=-1)
    return RawOutputs(distances.unflatten(-1, (4, reg_max)), classes, priors[:, :2], priors[:, 2:3])


def decode_bboxes(outputs: RawOutputs) -> Tensor:
    """Turn distributions into boxes by their means.

    Returns:
        Boxes, xyxy in pixels of the network's input, shape (N, P, 4), not clipped.
    """
    cells = torch.arange(outputs.distances.shape[-1], device=outputs.distances.device)
    # No matrix product: under autocast it would round pixels to 16 bits.
    means = (outputs.distances.softmax(-1) * cells).sum(-1)
    return distance2bbox(outputs.points, means * outputs.strides)
