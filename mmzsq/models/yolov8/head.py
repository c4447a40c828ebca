# SPDX-License-Identifier: Apache-2.0
"""Head of YOLOv8, which differs from that of YOLO11 in the convolutions of its classes."""

from __future__ import annotations

from mmcv.cnn import ConvModule

from mmzsq.models.yolo11.head import YOLO11Head
from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLOv8Head(YOLO11Head):
    """Predict distance distributions of the four box sides and class logits for each cell.

    The convolutions of the classes are plain 3x3 convolutions. The arguments are those of
    :class:`~mmzsq.models.yolo11.head.YOLO11Head`.
    """

    class_conv = ConvModule
