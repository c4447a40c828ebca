# SPDX-License-Identifier: Apache-2.0
"""YOLOv5 as an MMDetection detector."""

from __future__ import annotations

from mmdet.models.detectors import SingleStageDetector

from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLOv5(SingleStageDetector):
    """YOLOv5CSPDarknet, YOLOv5PAFPN and YOLOv5Head.

    Takes RGB images in [0, 1], letterboxed. Arguments are those of
    :class:`~mmdet.models.detectors.SingleStageDetector`.
    """
