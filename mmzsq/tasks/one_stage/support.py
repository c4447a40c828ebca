# SPDX-License-Identifier: Apache-2.0
"""Which one-stage heads have a batched loss, and what they must be made of for it to be theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmdet.models.dense_heads import ATSSHead, FCOSHead, GFLHead, RetinaHead, RTMDetHead, RTMDetSepBNHead, YOLOXHead
from mmdet.models.detectors import SingleStageDetector
from mmdet.models.losses import CrossEntropyLoss, DistributionFocalLoss, FocalLoss, QualityFocalLoss
from mmdet.models.task_modules import (
    BboxOverlaps2D,
    DeltaXYWHBBoxCoder,
    DistancePointBBoxCoder,
    DynamicSoftLabelAssigner,
    MlvlPointGenerator,
    PseudoSampler,
    SimOTAAssigner,
)
from torch import Tensor, nn

from mmzsq.tasks.elementwise_losses import BOX_LOSSES, OFFSET_LOSSES
from mmzsq.tasks.one_stage.dynamic import pad_labels, rtmdet_loss, yolox_loss
from mmzsq.tasks.one_stage.fixed import (
    anchor_targets,
    atss_loss,
    atss_targets,
    coded_anchor_targets,
    fcos_loss,
    gfl_loss,
    point_targets,
    retina_loss,
)
from mmzsq.tasks.support import unsupported_components, unsupported_settings


@dataclass(frozen=True)
class Family:
    """The batched loss of a kind of head, and the heads of that kind for which it is theirs.

    Attributes:
        assign: Makes all that depends on labels and map sizes: of a head, the labels of each image on the device, the
            sizes of the head's maps and that of the images, a (nested) named tuple of tensors of fixed shapes.
        loss: The loss of a head for its maps and what ``assign`` made, a scalar.
        parts: The classes that each part of the head may be of; a subclass may compute something else.
        settings: The values that each setting may have.
    """

    assign: Callable[..., Any]
    loss: Callable[..., Tensor]
    parts: Mapping[str, tuple[type, ...]]
    settings: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


SIGMOID = {'loss_cls.use_sigmoid': (True,), 'loss_cls.activated': (False,)}
MEAN = {'loss_cls.reduction': ('mean',), 'loss_bbox.reduction': ('mean',)}
CENTERNESS = {
    'loss_centerness.use_sigmoid': (True,),
    'loss_centerness.class_weight': (None,),
    'loss_centerness.reduction': ('mean',),
}
ANCHORS = {'prior_generator.use_box_type': (False,)}
CODER = {'bbox_coder.add_ctr_clamp': (False,), 'bbox_coder.use_box_type': (False,), 'reg_decoded_bbox': (False,)}

YOLOX = Family(
    pad_labels,
    yolox_loss,
    parts={
        'prior_generator': (MlvlPointGenerator,),
        'assigner': (SimOTAAssigner,),
        'assigner.iou_calculator': (BboxOverlaps2D,),
        'loss_cls': (CrossEntropyLoss,),
        'loss_bbox': BOX_LOSSES,
        'loss_obj': (CrossEntropyLoss,),
    },
    settings={
        'use_l1': (False,),
        'assigner.iou_calculator.dtype': (None,),
        'loss_bbox.reduction': ('sum',),
        **{
            f'{loss}.{setting}': (value,)
            for loss in ('loss_cls', 'loss_obj')
            for setting, value in (('use_sigmoid', True), ('class_weight', None), ('reduction', 'sum'))
        },
    },
)
RTMDET = Family(
    pad_labels,
    rtmdet_loss,
    parts={
        'prior_generator': (MlvlPointGenerator,),
        'assigner': (DynamicSoftLabelAssigner,),
        'assigner.iou_calculator': (BboxOverlaps2D,),
        'sampler': (PseudoSampler,),
        'loss_cls': (QualityFocalLoss,),
        'loss_bbox': BOX_LOSSES,
    },
    settings={
        'num_base_priors': (1,),
        'train_cfg.allowed_border': (-1,),
        'assigner.iou_calculator.dtype': (None,),
        **SIGMOID,
        **MEAN,
    },
)
RETINA = Family(
    coded_anchor_targets,
    retina_loss,
    parts={
        'bbox_coder': (DeltaXYWHBBoxCoder,),
        'sampler': (PseudoSampler,),
        'loss_cls': (FocalLoss,),
        'loss_bbox': OFFSET_LOSSES,
    },
    settings={**ANCHORS, **CODER, **SIGMOID, **MEAN},
)
ATSS = Family(
    atss_targets,
    atss_loss,
    parts={
        'bbox_coder': (DeltaXYWHBBoxCoder,),
        'sampler': (PseudoSampler,),
        'loss_cls': (FocalLoss,),
        'loss_bbox': BOX_LOSSES,
        'loss_centerness': (CrossEntropyLoss,),
    },
    settings={**ANCHORS, **CODER, 'reg_decoded_bbox': (True,), **SIGMOID, **MEAN, **CENTERNESS},
)
GFL = Family(
    anchor_targets,
    gfl_loss,
    parts={
        'bbox_coder': (DistancePointBBoxCoder,),
        'sampler': (PseudoSampler,),
        'loss_cls': (QualityFocalLoss,),
        'loss_bbox': BOX_LOSSES,
        'loss_dfl': (DistributionFocalLoss,),
    },
    settings={**ANCHORS, **SIGMOID, **MEAN, 'loss_dfl.reduction': ('mean',)},
)
FCOS = Family(
    point_targets,
    fcos_loss,
    parts={
        'bbox_coder': (DistancePointBBoxCoder,),
        'loss_cls': (FocalLoss,),
        'loss_bbox': BOX_LOSSES,
        'loss_centerness': (CrossEntropyLoss,),
    },
    settings={**SIGMOID, **MEAN, **CENTERNESS},
)

FAMILIES: dict[type, Family] = {
    ATSSHead: ATSS,
    FCOSHead: FCOS,
    GFLHead: GFL,
    RetinaHead: RETINA,
    RTMDetHead: RTMDET,
    RTMDetSepBNHead: RTMDET,
    YOLOXHead: YOLOX,
}
"""By exact class of the head: a subclass may compute something else."""


def unsupported_reason(detector: nn.Module) -> str | None:
    """Why no batched loss stands for ``detector.loss``; None if one does."""
    return next(_reasons(detector), None)


def _reasons(detector: Any) -> Iterator[str]:
    head = getattr(detector, 'bbox_head', None)
    if head is None:
        yield 'it has no bbox_head'
        return
    family = FAMILIES.get(type(head))
    if family is None:
        yield f'there is none for its {type(head).__name__}'
        return
    if getattr(type(detector), 'loss', None) is not SingleStageDetector.loss:
        yield 'it redefines its loss'
    yield from unsupported_components(
        detector, {f'bbox_head.{name}': allowed for name, allowed in family.parts.items()}
    )
    yield from unsupported_settings(
        detector, {f'bbox_head.{name}': allowed for name, allowed in family.settings.items()}
    )
