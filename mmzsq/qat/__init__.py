# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training: teacher and student as one model."""

from mmzsq.qat.zero_shot_detector import ZeroShotDetector

__all__ = ['ZeroShotDetector']
