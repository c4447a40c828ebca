# SPDX-License-Identifier: Apache-2.0
"""YOLOv8 as an MMDetection detector."""

from __future__ import annotations

from mmdet.models.detectors import SingleStageDetector

from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLOv8(SingleStageDetector):
    """YOLOv8 with ``YOLOv8CSPDarknet``, ``YOLOv8PAFPN`` and ``YOLOv8Head``.

    It takes letterboxed RGB images in [0, 1]. The arguments are those of
    :class:`~mmdet.models.detectors.SingleStageDetector`.
    """
