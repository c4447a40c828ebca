# SPDX-License-Identifier: Apache-2.0
"""Head of YOLO11: separate convolutions for boxes and classes, the loss and the detections."""

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
from mmzsq.models.yolo.layers import ACT_CFG, NORM_CFG, scale_widths
from mmzsq.models.yolo.post_processing import PostProcessor
from mmzsq.models.yolo11.decode import decode_bboxes, split_maps
from mmzsq.models.yolo11.loss import yolo11_loss
from mmzsq.registry import MODELS


@MODELS.register_module()
class YOLO11Head(PaddedTargetsHead):
    """Predict distance distributions of the four box sides and class logits for each cell.

    Args:
        num_classes: Number of classes C.
        widen_factor: Scales ``in_channels``.
        max_channels: Upper limit of ``in_channels`` before scaling.
        in_channels: Channels of each scale in size l without the limit.
        strides: Stride of each scale in pixels.
        reg_max: Number of distance bins R: 0, 1, ..., R - 1 cells.
        bbox_weight: Weight of the box term.
        cls_weight: Weight of the class term.
        dfl_weight: Weight of the distance term.
        topk: Maximum number of cells that a target is assigned to.
        alpha: Exponent of the score in the alignment.
        beta: Exponent of the CIoU in the alignment.
        norm_cfg: Normalization of every convolution except the last ones.
        act_cfg: Activation of every convolution except the last ones.
        train_cfg: Unused; passed by MMDetection.
        test_cfg: Arguments of :class:`~mmzsq.models.yolo.post_processing.PostProcessor`.
        init_cfg: Initialization of everything except the last biases.

    Raises:
        UserError: If ``strides`` and ``in_channels`` differ in length, or ``reg_max`` or ``topk`` is too small.
    """

    class_conv: type[nn.Module] = DepthwiseSeparableConvModule
    """Class of the hidden convolutions of the classes."""
    min_reg_max = 2
    """Smallest allowed ``reg_max``."""
    distance_loss = 'loss_dfl'
    """Name of the distance term of the loss."""
    distance_bias = 1.0
    """Last bias of the distances after :meth:`init_weights`."""
    final_topk: int | None = None
    """See :func:`~mmzsq.models.yolo11.assignment.assign_targets`."""
    min_side = 0.0
    """See :func:`~mmzsq.models.yolo11.assignment.assign_targets`."""

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
                f'{type(self).__name__} needs one entry per scale in strides and in_channels, but got '
                f'{len(strides)} and {len(in_channels)} entries'
            )
        for name, value, least in (('reg_max', reg_max, self.min_reg_max), ('topk', topk, 1)):
            if value < least:
                raise UserError(f'{name} of {type(self).__name__} must be at least {least}, not {value}')
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
                self.class_conv(width, cls_width, 3, **cfg),
                self.class_conv(cls_width, cls_width, 3, **cfg),
                nn.Conv2d(cls_width, num_classes, 1),
            )
            for width in widths
        )

    def init_weights(self) -> None:
        """Initialize the last biases to equal distance logits and to about 5 objects in 640x640 pixels."""
        super().init_weights()
        for box_convs, cls_convs, stride in zip(self.box_convs, self.cls_convs, self.strides, strict=True):
            box_convs.get_parameter('2.bias').data.fill_(self.distance_bias)
            cls_convs.get_parameter('2.bias').data.fill_(math.log(5 / self.num_classes / (640 / stride) ** 2))

    def forward(self, feats: Sequence[Tensor]) -> tuple[list[Tensor]]:
        """Return the raw outputs of each scale.

        Args:
            feats: Features of each scale, shape (N, C_in, H, W).

        Returns:
            A tuple with one list: one map (N, 4*R+C, H, W) per scale. Its channels are R logits each for the left, top,
            right and bottom distance, then the classes.
        """
        return (
            [
                torch.cat((box_convs(feat), cls_convs(feat)), dim=1)
                for box_convs, cls_convs, feat in zip(self.box_convs, self.cls_convs, feats, strict=True)
            ],
        )

    def loss_by_targets(self, maps: Sequence[Tensor], targets: PaddedTargets) -> dict[str, Tensor]:
        """Compute the loss of raw outputs for padded targets, with fixed shapes and without synchronization.

        Args:
            maps: Raw outputs in the order of :meth:`forward`.
            targets: Targets of the batch.

        Returns:
            ``loss_cls``, ``loss_bbox`` and the term named by ``distance_loss``: weighted scalars that do not grow with
            the batch size.
        """
        outputs = split_maps(maps, self.points, self.reg_max)
        bbox, cls, distance = yolo11_loss(
            outputs, targets, self.topk, self.alpha, self.beta, self.final_topk, self.min_side
        )
        return {
            'loss_cls': self.cls_weight * cls,
            'loss_bbox': self.bbox_weight * bbox,
            self.distance_loss: self.dfl_weight * distance,
        }

    def dense_predictions(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Decode every cell. Differentiable; computed in float32 for any dtype of the maps.

        YOLO11 has no objectness. The largest class logit of each cell is returned in its place.

        Args:
            maps: Raw outputs in the order of :meth:`forward`.

        Returns:
            Boxes (N, P, 4) in xyxy pixels of the network's input, not clipped, objectness logits (N, P) and class
            logits (N, P, C). The P locations are ordered by scale, row and column; the last varies fastest.
        """
        outputs = split_maps(maps, self.points, self.reg_max)
        return decode_bboxes(outputs), outputs.classes.amax(-1), outputs.classes

    def predict_by_feat(
        self,
        maps: Sequence[Tensor],
        batch_img_metas: Sequence[dict[str, Any]],
        rescale: bool = False,
    ) -> list[InstanceData]:
        """Compute detections from raw outputs. The score is the class probability.

        Args:
            maps: Raw outputs in the order of :meth:`forward`.
            batch_img_metas: Metadata of each image: ``img_shape``, and for ``rescale`` also ``ori_shape``,
                ``scale_factor`` and, for letterboxed images, ``pad_param``.
            rescale: Whether to return boxes in pixels of the original image instead of the network's input.

        Returns:
            Per image, ``bboxes`` (n, 4) in xyxy pixels, ``scores`` (n,) and ``labels`` (n,), sorted by descending
            score.
        """
        bboxes, _, cls_logits = self.dense_predictions(maps)
        certain = cls_logits.new_ones(cls_logits.shape[:2])
        return self.post_processor.process_batch(bboxes, certain, cls_logits.sigmoid(), batch_img_metas, rescale)
