# SPDX-License-Identifier: Apache-2.0
"""Helpers shared by the converters: expected tensor shapes and their validation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmzsq.errors import UserError
from mmzsq.models.yolo.layers import scale_depth, scale_width

SHOWN_FAULTS = 5


class ConvertedDetector(NamedTuple):
    """Weights of a detector under the names of this package.

    Attributes:
        family: Name of the family, such as ``'YOLO11'`` or ``'RetinaNet'``.
        size: Letter of the size, or name of the backbone.
        num_classes: Number of classes.
        state_dict: All tensors of the detector, with floating-point tensors in float32.
        note: An assumption about the weights that the file does not confirm, and how to change it; else empty.
    """

    family: str
    size: str
    num_classes: int
    state_dict: dict[str, Tensor]
    note: str = ''


def tensor_shapes(parts: Mapping[str, nn.Module]) -> dict[str, torch.Size]:
    """Return the shape of every tensor of a detector by name.

    Args:
        parts: The detector's modules by attribute name.
    """
    return {
        f'{part}.{name}': tensor.shape for part, module in parts.items() for name, tensor in module.state_dict().items()
    }


def to_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert floating-point tensors to float32; integer tensors are unchanged."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def find_size(
    sizes: Mapping[str, Any], base_width: int, base_depth: int, width: int, depth: int, model: str, block: str
) -> str:
    """Identify the size of a YOLO model by the width of its stem and the depth of its first stage.

    Args:
        sizes: Sizes by letter, with ``widen_factor`` and ``deepen_factor``.
        base_width: Channels of the stem in size l, before scaling.
        base_depth: Number of blocks in the first stage in size l, before scaling.
        width: Channels of the stem in the checkpoint.
        depth: Number of blocks in the first stage of the checkpoint.
        model: Name of the model in the message.
        block: Name of the blocks in the message.

    Returns:
        The letter of the size.

    Raises:
        UserError: If no size matches.
    """
    for letter, size in sizes.items():
        scaled = scale_width(base_width, size.widen_factor), scale_depth(base_depth, size.deepen_factor)
        if scaled == (width, depth):
            return letter
    raise UserError(
        f'{model} has no size with {width} channels in the stem and {depth} {block} in the first stage. '
        f'Its sizes are {", ".join(sizes)}'
    )


def check_num_classes(num_classes: int) -> None:
    """Check the number of classes that the shape of a head implies.

    Raises:
        UserError: If it is below 1.
    """
    if num_classes < 1:
        raise UserError(f'these are not the weights of a detector: its head has outputs for {num_classes} classes')


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], model: str) -> None:
    """Check that names and shapes of tensors match a model.

    Args:
        tensors: Tensors by name.
        expected: Shapes of the model's tensors by name.
        model: Name of the model in the message.

    Raises:
        UserError: If a tensor is missing, unexpected or has the wrong shape. The message lists some of them.
    """
    faults = [f'missing {name}' for name in expected.keys() - tensors.keys()]
    faults += [f'unexpected {name}' for name in tensors.keys() - expected.keys()]
    faults += [
        f'{name} has shape {tuple(tensor.shape)}, not {tuple(expected[name])}'
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name]
    ]
    if faults:
        shown = '; '.join(sorted(faults)[:SHOWN_FAULTS])
        raise UserError(
            f'these are not the weights of a {model} with batch norms (fused models cannot be converted). '
            f'{len(faults)} mismatched tensors: {shown}'
        )
