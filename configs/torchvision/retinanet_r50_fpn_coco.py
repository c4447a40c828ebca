# SPDX-License-Identifier: Apache-2.0
"""torchvision's ``retinanet_resnet50_fpn`` in MMDetection's classes, for ``python -m mmzsq.quantize``."""

_base_ = 'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'

custom_imports = dict(imports=['mmzsq'], allow_failed_imports=False)

model = dict(
    backbone=dict(init_cfg=None),
    neck=dict(add_extra_convs='on_output', relu_before_extra_convs=True),
    bbox_head=dict(anchor_generator=dict(type='mmzsq.TorchvisionAnchorGenerator')),
    test_cfg=dict(max_per_img=300),
)
