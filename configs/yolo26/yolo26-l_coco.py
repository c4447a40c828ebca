# SPDX-License-Identifier: Apache-2.0
"""YOLO26 l on COCO; the other sizes change the factors that scale depth and width."""

_base_ = [
    'mmdet::_base_/default_runtime.py',
    '../_base_/datasets/coco_letterbox.py',
    '../_base_/schedules/yolo_300e.py',
]

custom_imports = dict(imports=['mmzsq'], allow_failed_imports=False)

model = dict(
    type='mmzsq.YOLO26',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[0.0, 0.0, 0.0],
        std=[255.0, 255.0, 255.0],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(
        type='mmzsq.YOLO26CSPDarknet', deepen_factor=1.0, widen_factor=1.0, max_channels=512, c3k_everywhere=True
    ),
    neck=dict(type='mmzsq.YOLO26PAFPN', deepen_factor=1.0, widen_factor=1.0, max_channels=512),
    bbox_head=dict(type='mmzsq.YOLO26Head', num_classes=80, widen_factor=1.0, max_channels=512),
    test_cfg=dict(
        score_thr=0.001,
        nms=None,
        max_per_img=300,
    ),
)

default_hooks = dict(checkpoint=dict(interval=10, max_keep_ckpts=3))
