# SPDX-License-Identifier: Apache-2.0
"""Transforms of data pipelines that MMDetection lacks."""

from mmzsq.datasets.transforms.letterbox import LetterResize

__all__ = ['LetterResize']
