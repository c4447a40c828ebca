# SPDX-License-Identifier: Apache-2.0
"""The sections ``zsq.distillation`` and ``zsq.train.augmentation``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mmzsq.typed_section import NonNegativeFloat, Settings, Share, TypedSection


class DistillationConfig(TypedSection):
    """Losses of the student: distillation from the teacher, and the detection loss."""

    detection_weight: NonNegativeFloat
    """Weight of the detector's own loss on the labels of the calibration set."""
    losses: list[Settings]
    """Distillation losses: for each its ``type`` and arguments."""


class AugmentationConfig(TypedSection):
    """Random views of the images, equal for teacher and student."""

    flip: Share = 0.0
    """Probability that an image is mirrored."""
    mosaic: Share = 0.0
    """Probability that an image is replaced by four of the batch at half their size."""
    color: Annotated[float, Field(ge=0, le=2)] = 0.0
    """Largest change of a color channel's gain, as a natural logarithm."""
