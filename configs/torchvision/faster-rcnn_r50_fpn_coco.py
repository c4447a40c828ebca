# SPDX-License-Identifier: Apache-2.0
"""torchvision's ``fasterrcnn_resnet50_fpn`` in MMDetection's classes, for ``python -m mmzsq.quantize``."""

_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmzsq'], allow_failed_imports=False)

model = dict(
    backbone=dict(init_cfg=None),
    rpn_head=dict(anchor_generator=dict(type='mmzsq.TorchvisionAnchorGenerator')),
    roi_head=dict(
        bbox_roi_extractor=dict(roi_layer=dict(sampling_ratio=2, aligned=False)),
    ),
)
