# SPDX-License-Identifier: Apache-2.0
"""YOLOv5 as an MMDetection detector."""

from __future__ import annotations

from mmdet.models.detectors import SingleStageDetector

from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLOv5(SingleStageDetector):
    """YOLOv5 with ``YOLOv5CSPDarknet``, ``YOLOv5PAFPN`` and ``YOLOv5Head``.

    It takes letterboxed RGB images in [0, 1]. The arguments are those of
    :class:`~mmdet.models.detectors.SingleStageDetector`.
    """
