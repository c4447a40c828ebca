# SPDX-License-Identifier: Apache-2.0
"""Backbone of YOLO26: that of YOLO11 with a residual SPPF."""

from __future__ import annotations

from mmzsq.models.yolo11.backbone import YOLO11CSPDarknet
from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLO26CSPDarknet(YOLO11CSPDarknet):
    """CSPDarknet with C3k2 blocks, a residual SPPF and C2PSA.

    The arguments are those of :class:`~mmzsq.models.yolo11.backbone.YOLO11CSPDarknet`.
    """

    sppf_residual = True
