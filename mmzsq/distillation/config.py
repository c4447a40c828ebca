# SPDX-License-Identifier: Apache-2.0
"""The section ``zsq.distillation``: what the student learns from the teacher."""

from __future__ import annotations

from mmzsq.typed_section import NonNegativeFloat, Settings, TypedSection


class DistillationConfig(TypedSection):
    """What the student learns from the teacher."""

    detection_weight: NonNegativeFloat
    """Weight of the detector's own loss on the labels of the calibration set."""
    losses: list[Settings]
    """Distillation losses: for each its ``type`` and arguments."""
