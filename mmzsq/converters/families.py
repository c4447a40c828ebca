# SPDX-License-Identifier: Apache-2.0
"""Shared conversion of Ultralytics' anchor-free detectors: YOLOv8, YOLO11 and YOLO26.

The size (n, s, m, l or x) and the number of classes follow from tensor shapes. Then the name and shape of every tensor
are checked against the model of that size. Missing and unexpected tensors are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmzsq.converters.conversion import (
    ConvertedDetector,
    check_num_classes,
    check_tensors,
    find_size,
    tensor_shapes,
    to_float32,
)
from mmzsq.errors import UserError

INSIDE = (
    (r'\.box_convs\.', '.cv2.'),
    (r'\.cls_convs\.', '.cv3.'),
    (r'\.depthwise_conv\.', '.0.'),
    (r'\.pointwise_conv\.', '.1.'),
    (r'\.main_conv\.', '.cv1.'),
    (r'\.short_conv\.', '.cv2.'),
    (r'(\.blocks\.\d+)\.final_conv\.', r'\1.cv3.'),
    (r'\.final_conv\.', '.cv2.'),
    (r'\.conv(\d)\.', r'.cv\1.'),
    (r'\.blocks\.', '.m.'),
    (r'\.position\.', '.pe.'),
)
"""Patterns and replacements for names inside a layer, applied in this order."""


@dataclass(frozen=True)
class Family:
    """Names and sizes of a family of detectors.

    Attributes:
        name: Name for messages.
        sizes: Settings of each size by its letter, with ``deepen_factor`` and ``widen_factor``.
        layers: Ultralytics' name of each layer by the name in this package.
        stem_width: Channels of the stem in size l, before scaling.
        stage_depth: Number of blocks in the first stage in size l, before scaling.
        markers: Names of tensors that all detectors of the family have. The first one has an output for each class.
        build: Builds the parts of a detector by attribute name from a size and the number of classes.
        inside: Patterns and replacements for names inside a layer, applied in this order.
        unused: Pattern of names that serve training alone and are left out; None: there are none.
        foreign: Name of a tensor that tells a similar family apart; None: there is none.
    """

    name: str
    sizes: Mapping[str, Any]
    layers: Mapping[str, str]
    stem_width: int
    stage_depth: int
    markers: tuple[str, ...]
    build: Callable[[Any, int], Mapping[str, nn.Module]]
    inside: tuple[tuple[str, str], ...] = INSIDE
    unused: str | None = None
    foreign: str | None = None

    def matches(self, tensors: Mapping[str, Tensor]) -> bool:
        """Return whether tensors under Ultralytics' names have the markers of the family, and not the foreign one."""
        return all(name in tensors for name in self.markers) and self.foreign not in tensors

    def convert(self, tensors: Mapping[str, Tensor]) -> ConvertedDetector:
        """Rename Ultralytics' tensors and check them.

        Args:
            tensors: Parameters and buffers under Ultralytics' names, with separate batch norms.

        Returns:
            The weights; ``size`` is a key of ``sizes``.

        Raises:
            UserError: If they are not the weights of this family. The message lists tensors that are missing,
                unexpected or of the wrong shape.
        """
        size, num_classes = self._detect(tensors)
        expected = self.expected_shapes(self.sizes[size], num_classes)
        names = {self.upstream_name(name): name for name in expected}
        constant = f'{self.layers["bbox_head"]}.dfl.conv.weight'
        state_dict = {
            names.get(name, name): tensor
            for name, tensor in tensors.items()
            if not (name == constant and _is_range(tensor))
            and not (self.unused is not None and re.fullmatch(self.unused, name))
        }
        check_tensors(state_dict, expected, f'{self.name}-{size}')
        return ConvertedDetector(self.name, size, num_classes, to_float32(state_dict))

    def expected_shapes(self, size: Any, num_classes: int) -> dict[str, torch.Size]:
        """Return the shape of every tensor of a detector, without allocating memory.

        Args:
            size: One of ``sizes``.
            num_classes: Number of classes.
        """
        with torch.device('meta'):
            return tensor_shapes(self.build(size, num_classes))

    def upstream_name(self, name: str) -> str:
        """Convert the name of a tensor in this package to Ultralytics' name."""
        layer = next(layer for layer in self.layers if name.startswith(f'{layer}.'))
        inside = name.removeprefix(layer)
        for pattern, replacement in self.inside:
            inside = re.sub(pattern, replacement, inside)
        return self.layers[layer] + inside

    def _detect(self, tensors: Mapping[str, Tensor]) -> tuple[str, int]:
        """Derive the size and the number of classes from tensor shapes."""
        try:
            width = tensors['model.0.conv.weight'].shape[0]
            num_classes = tensors[self.markers[0]].shape[0]
        except (KeyError, IndexError) as error:
            raise UserError(
                f'this is not a {self.name} detector: it lacks the stem or the head of that model'
            ) from error
        check_num_classes(num_classes)
        depth = sum(re.fullmatch(r'model\.2\.m\.\d+\.cv1\.conv\.weight', name) is not None for name in tensors)
        size = find_size(self.sizes, self.stem_width, self.stage_depth, width, depth, self.name, 'blocks')
        return size, num_classes


def _is_range(tensor: Tensor) -> bool:
    """Return whether a tensor is the constant 0, 1, ... of the distances, which is not a weight in this package."""
    return torch.equal(tensor.flatten().float(), torch.arange(float(tensor.numel())))
