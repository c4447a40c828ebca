# SPDX-License-Identifier: Apache-2.0
"""YOLOv8 n on COCO."""

_base_ = './yolov8-l_coco.py'

model = dict(
    backbone=dict(deepen_factor=0.33, widen_factor=0.25, max_channels=1024),
    neck=dict(deepen_factor=0.33, widen_factor=0.25, max_channels=1024),
    bbox_head=dict(widen_factor=0.25, max_channels=1024),
)
