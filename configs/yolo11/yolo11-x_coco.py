# SPDX-License-Identifier: Apache-2.0
"""YOLO11 x on COCO."""

_base_ = './yolo11-l_coco.py'

model = dict(
    backbone=dict(widen_factor=1.5),
    neck=dict(widen_factor=1.5),
    bbox_head=dict(widen_factor=1.5),
)
