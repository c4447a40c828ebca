# SPDX-License-Identifier: Apache-2.0
"""Procedural pictures: calibration images that need neither data nor a detector."""

from mmzsq.synthesis.procedural.drawing import PICTURES_VERSION, draw_pictures, picture_seed
from mmzsq.synthesis.procedural.pictures import procedural_image

__all__ = [
    'PICTURES_VERSION',
    'draw_pictures',
    'picture_seed',
    'procedural_image',
]
