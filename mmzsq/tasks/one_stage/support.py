# SPDX-License-Identifier: Apache-2.0
"""Batched losses of one-stage heads, and the components and settings that each of them supports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mmdet.models.dense_heads import (
    ATSSHead,
    FCOSHead,
    GFLHead,
    RetinaHead,
    RTMDetHead,
    RTMDetSepBNHead,
    YOLOV3Head,
    YOLOXHead,
)
from mmdet.models.detectors import SingleStageDetector
from mmdet.models.losses import CrossEntropyLoss, DistributionFocalLoss, FocalLoss, MSELoss, QualityFocalLoss
from mmdet.models.task_modules import (
    BboxOverlaps2D,
    DeltaXYWHBBoxCoder,
    DistancePointBBoxCoder,
    DynamicSoftLabelAssigner,
    GridAssigner,
    MlvlPointGenerator,
    PseudoSampler,
    SimOTAAssigner,
    YOLOAnchorGenerator,
    YOLOBBoxCoder,
)
from torch import Tensor, nn

from mmzsq.tasks.elementwise_losses import IOU_LOSSES, L1_LOSSES
from mmzsq.tasks.one_stage.dynamic_assignment import pad_labels, rtmdet_loss, yolox_loss
from mmzsq.tasks.one_stage.static_assignment import (
    anchor_targets,
    atss_loss,
    atss_targets,
    coded_anchor_targets,
    fcos_loss,
    gfl_loss,
    grid_targets,
    point_targets,
    retina_loss,
    yolov3_loss,
)
from mmzsq.tasks.support import unsupported_components, unsupported_settings


@dataclass(frozen=True)
class BatchedLoss:
    """The batched loss of a class of heads and the requirements for using it.

    Attributes:
        assign: Computes everything that depends only on labels and map sizes. Takes the head, the labels of each image
            on the device, the sizes of the head's maps and the image size. Returns a (nested) named tuple of tensors
            with fixed shapes.
        loss: Computes the loss, a scalar. Takes the head, its maps and the result of ``assign``.
        components: Allowed classes of each component of the head. Subclasses may compute something else and are not
            allowed.
        settings: Allowed values of each setting.
    """

    assign: Callable[..., Any]
    loss: Callable[..., Tensor]
    components: Mapping[str, tuple[type, ...]]
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

YOLOX = BatchedLoss(
    pad_labels,
    yolox_loss,
    components={
        'prior_generator': (MlvlPointGenerator,),
        'assigner': (SimOTAAssigner,),
        'assigner.iou_calculator': (BboxOverlaps2D,),
        'loss_cls': (CrossEntropyLoss,),
        'loss_bbox': IOU_LOSSES,
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
RTMDET = BatchedLoss(
    pad_labels,
    rtmdet_loss,
    components={
        'prior_generator': (MlvlPointGenerator,),
        'assigner': (DynamicSoftLabelAssigner,),
        'assigner.iou_calculator': (BboxOverlaps2D,),
        'sampler': (PseudoSampler,),
        'loss_cls': (QualityFocalLoss,),
        'loss_bbox': IOU_LOSSES,
    },
    settings={
        'num_base_priors': (1,),
        'train_cfg.allowed_border': (-1,),
        'assigner.iou_calculator.dtype': (None,),
        **SIGMOID,
        **MEAN,
    },
)
RETINA = BatchedLoss(
    coded_anchor_targets,
    retina_loss,
    components={
        'bbox_coder': (DeltaXYWHBBoxCoder,),
        'sampler': (PseudoSampler,),
        'loss_cls': (FocalLoss,),
        'loss_bbox': L1_LOSSES,
    },
    settings={**ANCHORS, **CODER, **SIGMOID, **MEAN},
)
ATSS = BatchedLoss(
    atss_targets,
    atss_loss,
    components={
        'bbox_coder': (DeltaXYWHBBoxCoder,),
        'sampler': (PseudoSampler,),
        'loss_cls': (FocalLoss,),
        'loss_bbox': IOU_LOSSES,
        'loss_centerness': (CrossEntropyLoss,),
    },
    settings={**ANCHORS, **CODER, 'reg_decoded_bbox': (True,), **SIGMOID, **MEAN, **CENTERNESS},
)
GFL = BatchedLoss(
    anchor_targets,
    gfl_loss,
    components={
        'bbox_coder': (DistancePointBBoxCoder,),
        'sampler': (PseudoSampler,),
        'loss_cls': (QualityFocalLoss,),
        'loss_bbox': IOU_LOSSES,
        'loss_dfl': (DistributionFocalLoss,),
    },
    settings={**ANCHORS, **SIGMOID, **MEAN, 'loss_dfl.reduction': ('mean',)},
)
FCOS = BatchedLoss(
    point_targets,
    fcos_loss,
    components={
        'bbox_coder': (DistancePointBBoxCoder,),
        'loss_cls': (FocalLoss,),
        'loss_bbox': IOU_LOSSES,
        'loss_centerness': (CrossEntropyLoss,),
    },
    settings={**SIGMOID, **MEAN, **CENTERNESS},
)

YOLOV3 = BatchedLoss(
    grid_targets,
    yolov3_loss,
    components={
        'prior_generator': (YOLOAnchorGenerator,),
        'bbox_coder': (YOLOBBoxCoder,),
        'assigner': (GridAssigner,),
        'sampler': (PseudoSampler,),
        **{f'loss_{term}': (CrossEntropyLoss, MSELoss) for term in ('cls', 'conf', 'xy', 'wh')},
    },
)

BATCHED_LOSSES: dict[type, BatchedLoss] = {
    ATSSHead: ATSS,
    FCOSHead: FCOS,
    GFLHead: GFL,
    RetinaHead: RETINA,
    RTMDetHead: RTMDET,
    RTMDetSepBNHead: RTMDET,
    YOLOV3Head: YOLOV3,
    YOLOXHead: YOLOX,
}
"""Batched losses by class of the head."""

FREE_METHODS = frozenset(
    (
        *('_init_layers', '_init_predictor', '_init_cls_convs', '_init_reg_convs', 'init_weights', '_version'),
        *('forward', 'forward_single', 'predict', 'predict_by_feat', '_predict_by_feat_single', '_bbox_post_process'),
        *('aug_test', '_abc_impl'),
    )
)
"""Names that a subclass may override, since the loss reads the maps only. It may have special methods and new names."""


def batched_loss_of(head_class: type) -> BatchedLoss | None:
    """Return the batched loss of a class of heads; None if it has none.

    A subclass has the loss of its base if it changes only layers and predictions. It may compute another loss if it
    overrides any other method.
    """
    for position, base in enumerate(head_class.__mro__):
        if base in BATCHED_LOSSES:
            changed = {name for cls in head_class.__mro__[:position] for name in vars(cls)}
            overridden = {name for name in changed - FREE_METHODS if hasattr(base, name) and not name.startswith('__')}
            return None if overridden else BATCHED_LOSSES[base]
    return None


def unsupported_reason(detector: nn.Module) -> str | None:
    """Return why no batched loss can replace ``detector.loss``, or None if one can."""
    return next(_reasons(detector), None)


def _reasons(detector: Any) -> Iterator[str]:
    head = getattr(detector, 'bbox_head', None)
    if head is None:
        yield 'it has no bbox_head'
        return
    batched_loss = batched_loss_of(type(head))
    if batched_loss is None:
        yield f'{type(head).__name__} is not supported'
        return
    if getattr(type(detector), 'loss', None) is not SingleStageDetector.loss:
        yield 'it overrides `loss`'
    yield from unsupported_components(
        detector, {f'bbox_head.{name}': allowed for name, allowed in batched_loss.components.items()}
    )
    yield from unsupported_settings(
        detector, {f'bbox_head.{name}': allowed for name, allowed in batched_loss.settings.items()}
    )
