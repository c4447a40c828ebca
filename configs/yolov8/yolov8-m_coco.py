# SPDX-License-Identifier: Apache-2.0
"""YOLOv8 m on COCO."""

_base_ = './yolov8-l_coco.py'

model = dict(
    backbone=dict(deepen_factor=0.67, widen_factor=0.75, max_channels=768),
    neck=dict(deepen_factor=0.67, widen_factor=0.75, max_channels=768),
    bbox_head=dict(widen_factor=0.75, max_channels=768),
)
