# SPDX-License-Identifier: Apache-2.0
"""YOLO11 as an MMDetection detector."""

from __future__ import annotations

from mmdet.models.detectors import SingleStageDetector

from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLO11(SingleStageDetector):
    """YOLO11 with ``YOLO11CSPDarknet``, ``YOLO11PAFPN`` and ``YOLO11Head``.

    It takes letterboxed RGB images in [0, 1]. The arguments are those of
    :class:`~mmdet.models.detectors.SingleStageDetector`.
    """
