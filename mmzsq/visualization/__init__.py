# SPDX-License-Identifier: Apache-2.0
"""Images of calibration sets with their labels, and images with detections."""

from mmzsq.visualization.detections import draw_detections, join_side_by_side
from mmzsq.visualization.gallery import draw_gallery, draw_labels, save_gallery, save_set_gallery, save_side_by_side
from mmzsq.visualization.steps import draw_steps

__all__ = [
    'draw_detections',
    'draw_gallery',
    'draw_labels',
    'draw_steps',
    'join_side_by_side',
    'save_gallery',
    'save_set_gallery',
    'save_side_by_side',
]
