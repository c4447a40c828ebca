# SPDX-License-Identifier: Apache-2.0
"""YOLO26 as an MMDetection detector."""

from __future__ import annotations

from mmdet.models.detectors import SingleStageDetector

from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLO26(SingleStageDetector):
    """YOLO26 with ``YOLO26CSPDarknet``, ``YOLO26PAFPN`` and ``YOLO26Head``.

    It takes letterboxed RGB images in [0, 1]. The arguments are those of
    :class:`~mmdet.models.detectors.SingleStageDetector`.
    """
