# SPDX-License-Identifier: Apache-2.0
"""Pipeline transforms that MMDetection lacks."""

from mmzsq.datasets.transforms.letterbox import LetterResize

__all__ = ['LetterResize']
