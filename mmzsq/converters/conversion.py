# SPDX-License-Identifier: Apache-2.0
"""What converters of foreign weights share: the shapes that a detector wants, and the check that it gets them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmzsq.errors import UserError

SHOWN_FAULTS = 5


class ConvertedDetector(NamedTuple):
    """Weights under the names of this project's parts.

    Attributes:
        family: ``'YOLOv5'`` or ``'YOLO11'``.
        size: Letter of the size.
        num_classes: Number of classes.
        state_dict: All tensors of the detector, floats in float32.
    """

    family: str
    size: str
    num_classes: int
    state_dict: dict[str, Tensor]


def tensor_shapes(parts: Mapping[str, nn.Module]) -> dict[str, torch.Size]:
    """Shape of every tensor of a detector made of ``parts``, by its name in the detector."""
    return {
        f'{part}.{name}': tensor.shape for part, module in parts.items() for name, tensor in module.state_dict().items()
    }


def to_float32(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert floats of any precision; counters stay integers."""
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, torch.Size], model: str) -> None:
    """Compare names and shapes with those of a model.

    Args:
        tensors: What is there.
        expected: What the model wants.
        model: Its name, for the message.

    Raises:
        UserError: If a tensor is missing, left over, or of another shape; the message names some.
    """
    faults = [f'missing {name}' for name in expected.keys() - tensors.keys()]
    faults += [f'left over {name}' for name in tensors.keys() - expected.keys()]
    faults += [
        f'{name} has shape {tuple(tensor.shape)}, not {tuple(expected[name])}'
        for name, tensor in tensors.items()
        if name in expected and tensor.shape != expected[name]
    ]
    if faults:
        shown = '; '.join(sorted(faults)[:SHOWN_FAULTS])
        raise UserError(
            f'these are not the weights of a {model} with batch norms (fused models cannot be converted). '
            f'{len(faults)} tensors differ: {shown}'
        )
