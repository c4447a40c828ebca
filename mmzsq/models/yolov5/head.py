# SPDX-License-Identifier: Apache-2.0
"""Head of YOLOv5: one 1x1 convolution per scale, the loss and the detections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.errors import UserError, check_keys
from mmzsq.models.padded_head import PaddedTargetsHead
from mmzsq.models.padded_targets import PaddedTargets
from mmzsq.models.yolo.layers import scale_width
from mmzsq.models.yolo.post_processing import PostProcessor
from mmzsq.models.yolov5.decode import decode_bboxes
from mmzsq.models.yolov5.loss import yolov5_loss
from mmzsq.registry import MODELS

COCO_ANCHORS = (
    ((10, 13), (16, 30), (33, 23)),
    ((30, 61), (62, 45), (59, 119)),
    ((116, 90), (156, 198), (373, 326)),
)


@MODELS.register_module()
class YOLOv5Head(PaddedTargetsHead):
    """Predict a box, an objectness logit and class logits for each anchor in each cell.

    Args:
        num_classes: Number of classes C.
        widen_factor: Scales ``in_channels``.
        in_channels: Channels of each scale in size l.
        anchors: Width and height in pixels of the A anchors of each scale. They are stored in the state dict, so a
            checkpoint contains the anchors that it was trained with.
        strides: Stride of each scale in pixels.
        bbox_weight: Weight of the box term for three scales.
        cls_weight: Weight of the class term for three scales and 80 classes. It is scaled with the number of classes.
        obj_weight: Weight of the objectness term for three scales and 640x640 pixels. It is scaled with the image area.
        obj_balance: Weight of each scale within the objectness term.
        max_anchor_ratio: Upper bound of the ratio of target and anchor sides for a match.
        train_cfg: Unused; passed by MMDetection.
        test_cfg: Arguments of :class:`~mmzsq.models.yolo.post_processing.PostProcessor`.
        init_cfg: Initialization of everything except the biases.

    Raises:
        UserError: If ``anchors``, ``strides``, ``in_channels`` and ``obj_balance`` differ in length.
    """

    anchors: Tensor

    def __init__(
        self,
        num_classes: int,
        widen_factor: float = 1.0,
        in_channels: Sequence[int] = (256, 512, 1024),
        anchors: Sequence[Sequence[tuple[float, float]]] = COCO_ANCHORS,
        strides: Sequence[int] = (8, 16, 32),
        bbox_weight: float = 0.05,
        cls_weight: float = 0.5,
        obj_weight: float = 1.0,
        obj_balance: Sequence[float] = (4.0, 1.0, 0.4),
        max_anchor_ratio: float = 4.0,
        train_cfg: dict[str, Any] | None = None,
        test_cfg: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        lengths = {
            'anchors': len(anchors),
            'strides': len(strides),
            'in_channels': len(in_channels),
            'obj_balance': len(obj_balance),
        }
        if len(set(lengths.values())) != 1:
            raise UserError(f'YOLOv5Head needs one entry per scale in each of these arguments, but got {lengths}')
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.obj_balance = tuple(obj_balance)
        self.max_anchor_ratio = max_anchor_ratio
        share = 3 / len(strides)
        self.bbox_weight = bbox_weight * share
        self.cls_weight = cls_weight * share * num_classes / 80
        self.obj_weight = obj_weight * share
        test_cfg = test_cfg or {}
        check_keys(test_cfg, (field.name for field in fields(PostProcessor)), 'test_cfg')
        self.post_processor = PostProcessor(**test_cfg)
        self.register_buffer('anchors', torch.tensor(anchors, dtype=torch.float32))
        outputs = self.anchors.shape[1] * (5 + num_classes)
        self.convs = nn.ModuleList(nn.Conv2d(scale_width(width, widen_factor), outputs, 1) for width in in_channels)

    def init_weights(self) -> None:
        """Initialize the biases for about 8 objects in 640x640 pixels and a class probability of 0.6 / C."""
        super().init_weights()
        for conv, stride in zip(self.convs, self.strides, strict=True):
            bias = conv.get_parameter('bias').data.view(self.anchors.shape[1], -1)
            bias[:, 4] = math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] = math.log(0.6 / (self.num_classes - 0.99999))

    def forward(self, feats: Sequence[Tensor]) -> tuple[list[Tensor]]:
        """Return the raw outputs of each scale.

        Args:
            feats: Features of each scale, shape (N, C_in, H, W).

        Returns:
            A tuple with one list: one map (N, A*(5+C), H, W) per scale. Its channels are grouped by anchor; each group
            contains center x, center y, width, height, objectness and the classes.
        """
        return ([conv(feat) for conv, feat in zip(self.convs, feats, strict=True)],)

    def loss_by_targets(self, maps: Sequence[Tensor], targets: PaddedTargets) -> dict[str, Tensor]:
        """Compute the loss of raw outputs for padded targets, with fixed shapes and without synchronization.

        Args:
            maps: Raw outputs in the order of :meth:`forward`.
            targets: Targets of the batch.

        Returns:
            ``loss_cls``, ``loss_bbox`` and ``loss_obj``: weighted scalars, averaged over the batch.
        """
        bbox, obj, cls = yolov5_loss(maps, targets, self.anchors, self.strides, self.obj_balance, self.max_anchor_ratio)
        rows, columns = maps[0].shape[-2:]
        area = rows * columns * self.strides[0] ** 2 / 640**2
        return dict(
            loss_cls=self.cls_weight * cls,
            loss_bbox=self.bbox_weight * bbox,
            loss_obj=self.obj_weight * area * obj,
        )

    def dense_predictions(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Decode every anchor of every cell. Differentiable; computed in float32 for any dtype of the maps.

        Args:
            maps: Raw outputs in the order of :meth:`forward`.

        Returns:
            Boxes (N, P, 4) in xyxy pixels of the network's input, not clipped, objectness logits (N, P) and class
            logits (N, P, C). The P locations are ordered by scale, anchor, row and column; the last varies fastest.
        """
        bboxes, obj_logits, cls_logits = [], [], []
        for scale_map, anchors, stride in zip(maps, self.anchors, self.strides, strict=True):
            outputs = scale_map.float().unflatten(1, (len(anchors), -1)).movedim(2, -1)
            rows, columns = outputs.shape[2:4]
            x = torch.arange(columns, device=outputs.device)
            y = torch.arange(rows, device=outputs.device)[:, None]
            decoded = decode_bboxes(outputs[..., :4], x, y, anchors[:, None, None], stride)
            bboxes.append(decoded.flatten(1, 3))
            obj_logits.append(outputs[..., 4].flatten(1))
            cls_logits.append(outputs[..., 5:].flatten(1, 3))
        return torch.cat(bboxes, 1), torch.cat(obj_logits, 1), torch.cat(cls_logits, 1)

    def anchor_sizes(self) -> Tensor:
        """Return width and height of the anchors of all scales in pixels, (K, 2).

        The anchors are clusters of the training boxes, so they describe the sizes of the training labels.
        """
        return self.anchors.reshape(-1, 2)

    def class_biases(self) -> list[Tensor]:
        """Return the biases of the class logits of each scale, (A, C)."""
        return [conv.get_parameter('bias').view(self.anchors.shape[1], -1)[:, 5:] for conv in self.convs]

    def predict_by_feat(
        self,
        maps: Sequence[Tensor],
        batch_img_metas: Sequence[dict[str, Any]],
        rescale: bool = False,
    ) -> list[InstanceData]:
        """Compute detections from raw outputs.

        Args:
            maps: Raw outputs in the order of :meth:`forward`.
            batch_img_metas: Metadata of each image: ``img_shape``, and for ``rescale`` also ``ori_shape``,
                ``scale_factor`` and, for letterboxed images, ``pad_param``.
            rescale: Whether to return boxes in pixels of the original image instead of the network's input.

        Returns:
            Per image, ``bboxes`` (n, 4) in xyxy pixels, ``scores`` (n,) and ``labels`` (n,), sorted by descending
            score.
        """
        bboxes, obj_logits, cls_logits = self.dense_predictions(maps)
        return self.post_processor.process_batch(
            bboxes, obj_logits.sigmoid(), cls_logits.sigmoid(), batch_img_metas, rescale
        )
