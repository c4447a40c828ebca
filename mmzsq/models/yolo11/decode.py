# SPDX-License-Identifier: Apache-2.0
"""Box decoding of YOLOv8 and YOLO11 from four distance distributions (Li et al. 2020, arXiv:2006.04388).

Each location predicts the distances from its center to the four sides of the box. Each distance is a distribution over
0, 1, ... cells. YOLO26 has a single bin, whose value is the distance in cells itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmdet.models.task_modules.prior_generators import MlvlPointGenerator
from mmdet.structures.bbox import distance2bbox
from torch import Tensor


class RawOutputs(NamedTuple):
    """Raw outputs of P locations in float32, and the positions of these locations.

    Locations are ordered by scale, row and column; the last varies fastest.

    Attributes:
        distances: Logits of the left, top, right and bottom distances, shape (N, P, 4, R); with R = 1 the distances in
            cells.
        classes: Class logits, shape (N, P, C).
        points: Center x and y of each location in pixels of the network's input, shape (P, 2).
        strides: Stride of each location's scale in pixels, shape (P, 1).
    """

    distances: Tensor
    classes: Tensor
    points: Tensor
    strides: Tensor


def split_maps(maps: Sequence[Tensor], generator: MlvlPointGenerator, reg_max: int) -> RawOutputs:
    """Concatenate the maps of all scales and split them into distances and classes.

    Args:
        maps: Raw outputs of each scale, shape (N, 4*R+C, H, W).
        generator: Generates the locations of each scale.
        reg_max: Number of distance bins R.
    """
    sizes = [scale_map.shape[-2:] for scale_map in maps]
    priors = torch.cat(generator.grid_priors(sizes, device=maps[0].device, with_stride=True))
    outputs = torch.cat([scale_map.float().flatten(2) for scale_map in maps], dim=2).transpose(1, 2)
    distances, classes = outputs.tensor_split((4 * reg_max,), dim=-1)
    return RawOutputs(distances.unflatten(-1, (4, reg_max)), classes, priors[:, :2], priors[:, 2:3])


def decode_bboxes(outputs: RawOutputs) -> Tensor:
    """Decode the means of the distance distributions, or the distances themselves, to boxes.

    Args:
        outputs: Raw outputs of all locations.

    Returns:
        Boxes in xyxy pixels of the network's input, shape (N, P, 4), not clipped.
    """
    bins = outputs.distances.shape[-1]
    if bins == 1:
        # Not distance2bbox: OpenVINO 2026.4 cannot compile the graph of its indexing behind this reshape.
        low, high = (outputs.distances.flatten(-2) * outputs.strides).split(2, dim=-1)
        return torch.cat((outputs.points - low, outputs.points + high), dim=-1)
    cells = torch.arange(bins, device=outputs.distances.device)
    # A sum instead of a matrix product, which autocast would compute in 16 bits.
    means = (outputs.distances.softmax(-1) * cells).sum(-1)
    return distance2bbox(outputs.points, means * outputs.strides)
