# SPDX-License-Identifier: Apache-2.0
"""The head of YOLO11: convolutions of their own for boxes and for classes, its loss and its detections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from mmdet.models.task_modules.prior_generators import MlvlPointGenerator
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.errors import UserError, check_keys
from mmzsq.models.padded_head import PaddedTargetsHead
from mmzsq.models.padded_targets import PaddedTargets
from mmzsq.models.yolo.layers import ACT_CFG, NORM_CFG
from mmzsq.models.yolo.post_processing import PostProcessor
from mmzsq.models.yolo11.decode import decode_bboxes, split_maps
from mmzsq.models.yolo11.layers import scale_widths
from mmzsq.models.yolo11.loss import yolo11_loss
from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLO11Head(PaddedTargetsHead):
    """Predicts, for each cell, the distances of four sides as distributions, and a logit for each class.

    Args:
        num_classes: Number of classes C.
        widen_factor: Scales ``in_channels``.
        max_channels: Limit of ``in_channels`` before they are scaled.
        in_channels: Channels of each scale at size l without its limit.
        strides: Pixels between cells, for each scale.
        reg_max: R, the number of distances, in cells from 0.
        bbox_weight: Weight of the box term.
        cls_weight: Weight of the class term.
        dfl_weight: Weight of the distance term.
        topk: Most cells that answer for a target.
        alpha: Exponent of the score in the alignment of a cell with a target.
        beta: Exponent of the CIoU in it.
        norm_cfg: Normalization of every convolution but the last.
        act_cfg: Activation of every convolution but the last.
        train_cfg: Not used; MMDetection passes it.
        test_cfg: The arguments of :class:`~mmzsq.models.yolo.post_processing.PostProcessor`.
        init_cfg: Initialization besides that of the last biases.

    Raises:
        UserError: If ``strides`` and ``in_channels`` are not of one length, or ``reg_max`` or ``topk`` is too small.
    """

    def __init__(
        self,
        num_classes: int,
        widen_factor: float = 1.0,
        max_channels: int = 512,
        in_channels: Sequence[int] = (256, 512, 1024),
        strides: Sequence[int] = (8, 16, 32),
        reg_max: int = 16,
        bbox_weight: float = 7.5,
        cls_weight: float = 0.5,
        dfl_weight: float = 1.5,
        topk: int = 10,
        alpha: float = 0.5,
        beta: float = 6.0,
        norm_cfg: dict[str, Any] = NORM_CFG,
        act_cfg: dict[str, Any] = ACT_CFG,
        train_cfg: dict[str, Any] | None = None,
        test_cfg: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if len(strides) != len(in_channels):
            raise UserError(
                f'YOLO11Head needs one entry a scale in strides and in_channels, but got {len(strides)} and '
                f'{len(in_channels)}'
            )
        for name, value, least in (('reg_max', reg_max, 2), ('topk', topk, 1)):
            if value < least:
                raise UserError(f'{name} of YOLO11Head must be at least {least}, not {value}')
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.reg_max = reg_max
        self.bbox_weight = bbox_weight
        self.cls_weight = cls_weight
        self.dfl_weight = dfl_weight
        self.topk, self.alpha, self.beta = topk, alpha, beta
        test_cfg = test_cfg or {}
        check_keys(test_cfg, (field.name for field in fields(PostProcessor)), 'test_cfg')
        self.post_processor = PostProcessor(**test_cfg)
        self.points = MlvlPointGenerator(strides)
        cfg = dict(padding=1, norm_cfg=norm_cfg, act_cfg=act_cfg)
        widths = scale_widths(tuple(in_channels), widen_factor, max_channels)
        box_width = max(16, widths[0] // 4, 4 * reg_max)
        cls_width = max(widths[0], min(num_classes, 100))
        self.box_convs = nn.ModuleList(
            nn.Sequential(
                ConvModule(width, box_width, 3, **cfg),
                ConvModule(box_width, box_width, 3, **cfg),
                nn.Conv2d(box_width, 4 * reg_max, 1),
            )
            for width in widths
        )
        self.cls_convs = nn.ModuleList(
            nn.Sequential(
                DepthwiseSeparableConvModule(width, cls_width, 3, **cfg),
                DepthwiseSeparableConvModule(cls_width, cls_width, 3, **cfg),
                nn.Conv2d(cls_width, num_classes, 1),
            )
            for width in widths
        )

    def init_weights(self) -> None:
        """Start from equal logits of the distances, and from about 5 objects in 640x640 pixels."""
        super().init_weights()
        for box_convs, cls_convs, stride in zip(self.box_convs, self.cls_convs, self.strides, strict=True):
            box_convs.get_parameter('2.bias').data.fill_(1.0)
            cls_convs.get_parameter('2.bias').data.fill_(math.log(5 / self.num_classes / (640 / stride) ** 2))

    def forward(self, feats: Sequence[Tensor]) -> tuple[list[Tensor]]:
        """Return the raw outputs of each scale.

        Args:
            feats: Features of each scale, shape (N, C_in, H, W).

        Returns:
            A tuple of one list: per scale (N, 4*R+C, H, W), the distances left, top, right and bottom with R logits
            each, then the classes.
        """
        return (
            [
                torch.cat((box_convs(feat), cls_convs(feat)), dim=1)
                for box_convs, cls_convs, feat in zip(self.box_convs, self.cls_convs, feats, strict=True)
            ],
        )

    def loss_by_targets(self, maps: Sequence[Tensor], targets: PaddedTargets) -> dict[str, Tensor]:
        """Compute the loss of raw outputs for padded targets: fixed shapes, no wait for the device.

        Args:
            maps: Raw outputs as :meth:`forward` lists them.
            targets: The targets of the batch.

        Returns:
            ``loss_cls``, ``loss_bbox`` and ``loss_dfl``, weighted scalars; the same for a batch repeated.
        """
        outputs = split_maps(maps, self.points, self.reg_max)
        bbox, cls, dfl = yolo11_loss(outputs, targets, self.topk, self.alpha, self.beta)
        return dict(
            loss_cls=self.cls_weight * cls,
            loss_bbox=self.bbox_weight * bbox,
            loss_dfl=self.dfl_weight * dfl,
        )

    def dense_predictions(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Decode every cell. Differentiable; in float32 whatever the maps are.

        YOLO11 has no objectness. That there is an object is as sure as the likeliest class: its logit stands for it.

        Args:
            maps: Raw outputs as :meth:`forward` lists them.

        Returns:
            Over P places (scale, row, column; the last is fastest): boxes (N, P, 4) xyxy in pixels of the network's
            input, not clipped; objectness logits (N, P); class logits (N, P, C).
        """
        outputs = split_maps(maps, self.points, self.reg_max)
        return decode_bboxes(outputs), outputs.classes.amax(-1), outputs.classes

    def predict_by_feat(
        self,
        maps: Sequence[Tensor],
        batch_img_metas: Sequence[dict[str, Any]],
        rescale: bool = False,
    ) -> list[InstanceData]:
        """Turn raw outputs into detections; a score is the probability of a class.

        Args:
            maps: Raw outputs as :meth:`forward` lists them.
            batch_img_metas: Of each image ``img_shape``; to rescale also ``ori_shape``, ``scale_factor`` and, when it
                was letterboxed, ``pad_param``.
            rescale: Whether boxes refer to the original image instead of the network's input.

        Returns:
            Per image ``bboxes`` (n, 4) xyxy in pixels, ``scores`` (n,) and ``labels`` (n,), best first.
        """
        bboxes, _, cls_logits = self.dense_predictions(maps)
        certain = cls_logits.new_ones(cls_logits.shape[:2])
        return self.post_processor.process_batch(bboxes, certain, cls_logits.sigmoid(), batch_img_metas, rescale)
