"""Mask R-CNN R50, trained from scratch on blood cells, without pretrained weights."""

_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', './schedule.py']

model = dict(
    # All stages are trained, and BatchNorm too.
    backbone=dict(frozen_stages=-1, norm_eval=False, init_cfg=None),
    roi_head=dict(bbox_head=dict(num_classes=3), mask_head=dict(num_classes=3)),
    # The same assignment without host synchronization.
    train_cfg=dict(
        rpn=dict(assigner=dict(type='mmzsq.MaxIoUAssigner')), rcnn=dict(assigner=dict(type='mmzsq.MaxIoUAssigner'))
    ),
)
