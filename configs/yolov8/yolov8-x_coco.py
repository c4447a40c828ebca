# SPDX-License-Identifier: Apache-2.0
"""YOLOv8 x on COCO."""

_base_ = './yolov8-l_coco.py'

model = dict(
    backbone=dict(widen_factor=1.25),
    neck=dict(widen_factor=1.25),
    bbox_head=dict(widen_factor=1.25),
)
