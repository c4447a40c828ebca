# SPDX-License-Identifier: Apache-2.0
"""Head of YOLO26: distances without distributions, and one location per object, so that no NMS is needed.

Ultralytics trains two branches, one with many locations per object and one with a single location (Wang et al. 2024,
arXiv:2405.14458). Detections come from the second branch alone. It is the only one here: it is what is distilled,
quantized and exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmzsq.errors import UserError
from mmzsq.models.yolo.layers import ACT_CFG, NORM_CFG
from mmzsq.models.yolo11.head import YOLO11Head
from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLO26Head(YOLO11Head):
    """Predict the distances of the four box sides and class logits for each cell, with one cell per object.

    Args:
        num_classes: Number of classes C.
        widen_factor: Scales ``in_channels``.
        max_channels: Upper limit of ``in_channels`` before scaling.
        in_channels: Channels of each scale in size l without the limit.
        strides: Stride of each scale in pixels.
        bbox_weight: Weight of the box term.
        cls_weight: Weight of the class term.
        l1_weight: Weight of the distance term, an L1 error relative to the image size.
        topk: Maximum number of cells that are candidates for a target.
        final_topk: Maximum number of candidates that a target is assigned to.
        min_side: Sides of targets, in pixels, below which candidates may also lie around the target.
        alpha: Exponent of the score in the alignment.
        beta: Exponent of the CIoU in the alignment.
        norm_cfg: Normalization of every convolution except the last ones.
        act_cfg: Activation of every convolution except the last ones.
        train_cfg: Unused; passed by MMDetection.
        test_cfg: Arguments of :class:`~mmzsq.models.yolo.post_processing.PostProcessor`; ``nms`` is None by default.
        init_cfg: Initialization of everything except the last biases.

    Raises:
        UserError: If ``strides`` and ``in_channels`` differ in length, ``topk`` or ``final_topk`` is below 1, or
            ``min_side`` is negative.
    """

    min_reg_max = 1
    distance_loss = 'loss_l1'
    distance_bias = 2.0

    def __init__(
        self,
        num_classes: int,
        widen_factor: float = 1.0,
        max_channels: int = 512,
        in_channels: Sequence[int] = (256, 512, 1024),
        strides: Sequence[int] = (8, 16, 32),
        bbox_weight: float = 7.5,
        cls_weight: float = 0.5,
        l1_weight: float = 1.5,
        topk: int = 7,
        final_topk: int = 1,
        min_side: float = 16.0,
        alpha: float = 0.5,
        beta: float = 6.0,
        norm_cfg: dict[str, Any] = NORM_CFG,
        act_cfg: dict[str, Any] = ACT_CFG,
        train_cfg: dict[str, Any] | None = None,
        test_cfg: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        if final_topk < 1:
            raise UserError(f'final_topk of {type(self).__name__} must be at least 1, not {final_topk}')
        if min_side < 0:
            raise UserError(f'min_side of {type(self).__name__} must not be negative, but it is {min_side}')
        super().__init__(
            num_classes,
            widen_factor,
            max_channels,
            in_channels,
            strides,
            reg_max=1,
            bbox_weight=bbox_weight,
            cls_weight=cls_weight,
            dfl_weight=l1_weight,
            topk=topk,
            alpha=alpha,
            beta=beta,
            norm_cfg=norm_cfg,
            act_cfg=act_cfg,
            train_cfg=train_cfg,
            test_cfg={'nms': None, **(test_cfg or {})},
            init_cfg=init_cfg,
        )
        self.final_topk = final_topk
        self.min_side = min_side
