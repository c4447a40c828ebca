# SPDX-License-Identifier: Apache-2.0
"""YOLOv5 m on COCO."""

_base_ = './yolov5-l_coco.py'

model = dict(
    backbone=dict(deepen_factor=0.67, widen_factor=0.75),
    neck=dict(deepen_factor=0.67, widen_factor=0.75),
    bbox_head=dict(widen_factor=0.75),
)
