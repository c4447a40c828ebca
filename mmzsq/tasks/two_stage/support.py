# SPDX-License-Identifier: Apache-2.0
"""Components and settings of the two-stage detectors that the batched loss supports."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmcv.ops import RoIAlign, nms
from mmdet.models.dense_heads import RPNHead
from mmdet.models.detectors import FasterRCNN, MaskRCNN, TwoStageDetector
from mmdet.models.losses import CrossEntropyLoss
from mmdet.models.roi_heads import StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead, ConvFCBBoxHead, Shared2FCBBoxHead, Shared4Conv1FCBBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner, RandomSampler
from torch import nn

from mmzsq.models.max_iou_assigner import SyncFreeMaxIoUAssigner
from mmzsq.models.torchvision_anchors import TorchvisionAnchorGenerator
from mmzsq.tasks.elementwise_losses import L1_LOSSES
from mmzsq.tasks.support import unsupported_components, unsupported_settings

COMPONENTS: dict[str, tuple[type, ...]] = {
    'rpn_head': (RPNHead,),
    'rpn_head.prior_generator': (AnchorGenerator, TorchvisionAnchorGenerator),
    'rpn_head.bbox_coder': (DeltaXYWHBBoxCoder,),
    'rpn_head.sampler': (RandomSampler,),
    'rpn_head.loss_cls': (CrossEntropyLoss,),
    'rpn_head.loss_bbox': L1_LOSSES,
    'roi_head': (StandardRoIHead,),
    'roi_head.bbox_assigner': (MaxIoUAssigner, SyncFreeMaxIoUAssigner),
    'roi_head.bbox_sampler': (RandomSampler,),
    'roi_head.bbox_roi_extractor': (SingleRoIExtractor,),
    'roi_head.bbox_roi_extractor.roi_layers.0': (RoIAlign,),
    'roi_head.bbox_head': (BBoxHead, ConvFCBBoxHead, Shared2FCBBoxHead, Shared4Conv1FCBBoxHead),
    'roi_head.bbox_head.bbox_coder': (DeltaXYWHBBoxCoder,),
    'roi_head.bbox_head.loss_cls': (CrossEntropyLoss,),
    'roi_head.bbox_head.loss_bbox': L1_LOSSES,
}
"""Allowed classes of each component. Subclasses may compute something else and are not allowed."""

SETTINGS: dict[str, tuple[Any, ...]] = {
    'rpn_head.prior_generator.use_box_type': (False,),
    'rpn_head.bbox_coder.add_ctr_clamp': (False,),
    'rpn_head.reg_decoded_bbox': (False,),
    'rpn_head.sampler.add_gt_as_proposals': (False,),
    'rpn_head.sampler.neg_pos_ub': (-1,),
    'rpn_head.loss_cls.use_sigmoid': (True,),
    'rpn_head.loss_cls.class_weight': (None,),
    'rpn_head.loss_cls.reduction': ('mean',),
    'rpn_head.loss_bbox.reduction': ('mean',),
    'roi_head.with_shared_head': (False,),
    'roi_head.bbox_assigner.gt_max_assign_all': (True,),
    'roi_head.bbox_assigner.perm_repeat_gt_cfg': (None,),
    'roi_head.bbox_sampler.neg_pos_ub': (-1,),
    'roi_head.bbox_roi_extractor.roi_layers.0.pool_mode': ('avg',),
    'roi_head.bbox_head.with_cls': (True,),
    'roi_head.bbox_head.with_reg': (True,),
    'roi_head.bbox_head.reg_decoded_bbox': (False,),
    'roi_head.bbox_head.loss_cls.use_sigmoid': (False,),
    'roi_head.bbox_head.loss_cls.class_weight': (None,),
    'roi_head.bbox_head.loss_cls.reduction': ('mean',),
    'roi_head.bbox_head.loss_bbox.reduction': ('mean',),
}
"""Allowed values of each setting."""

MASK_COMPONENTS: dict[str, tuple[type, ...]] = {
    'roi_head.mask_roi_extractor': (SingleRoIExtractor,),
    'roi_head.mask_roi_extractor.roi_layers.0': (RoIAlign,),
    'roi_head.mask_head': (FCNMaskHead,),
    'roi_head.mask_head.loss_mask': (CrossEntropyLoss,),
}
MASK_SETTINGS: dict[str, tuple[Any, ...]] = {
    'roi_head.share_roi_extractor': (False,),
    'roi_head.mask_roi_extractor.roi_layers.0.pool_mode': ('avg',),
    # The backward of bilinear upsampling has no fixed summation order, and PyTorch has no CARAFE operator.
    'roi_head.mask_head.upsample_method': ('deconv', 'nearest', None),
    'roi_head.mask_head.loss_mask.use_mask': (True,),
    'roi_head.mask_head.loss_mask.class_weight': (None,),
}


def unsupported_reason(detector: nn.Module) -> str | None:
    """Return why the batched loss cannot replace ``detector.loss``, or None if it can."""
    return next(_reasons(detector), None)


def _reasons(detector: Any) -> Iterator[str]:
    if type(detector) not in (TwoStageDetector, FasterRCNN, MaskRCNN):
        yield f'{type(detector).__name__} is not FasterRCNN or MaskRCNN'
    if detector.train_cfg is None:
        yield 'it has no train_cfg'
    yield from unsupported_components(detector, COMPONENTS)
    yield from unsupported_settings(detector, SETTINGS)
    if not isinstance(detector.roi_head.bbox_assigner.neg_iou_thr, float):
        yield 'roi_head.bbox_assigner.neg_iou_thr is a range'
    proposal_cfg = proposal_settings(detector)
    # A pure-Python config gives the function.
    if (suppression := proposal_cfg['nms'].get('type')) not in ('nms', nms):
        yield f'its proposals are suppressed by {suppression}'
    if detector.roi_head.with_mask:
        yield from unsupported_components(detector, MASK_COMPONENTS)
        yield from unsupported_settings(detector, MASK_SETTINGS)
        if detector.roi_head.train_cfg.get('soft_mask_target', False):
            yield 'its mask targets are soft'
        if detector.roi_head.mask_roi_extractor.featmap_strides != detector.roi_head.bbox_roi_extractor.featmap_strides:
            yield 'boxes and masks read different levels'


def proposal_settings(detector: Any) -> Mapping[str, Any]:
    """Return the proposal settings that ``detector`` uses during training."""
    return detector.train_cfg.get('rpn_proposal', detector.test_cfg.rpn)
