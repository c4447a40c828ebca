# SPDX-License-Identifier: Apache-2.0
"""Images of calibration sets with their labels."""

from mmzsq.visualization.gallery import draw_labels, save_gallery, save_set_gallery, save_side_by_side

__all__ = ['draw_labels', 'save_gallery', 'save_set_gallery', 'save_side_by_side']
