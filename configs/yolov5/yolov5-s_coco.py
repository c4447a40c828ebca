# SPDX-License-Identifier: Apache-2.0
"""YOLOv5 s on COCO."""

_base_ = './yolov5-l_coco.py'

model = dict(
    backbone=dict(deepen_factor=0.33, widen_factor=0.5),
    neck=dict(deepen_factor=0.33, widen_factor=0.5),
    bbox_head=dict(widen_factor=0.5),
)
