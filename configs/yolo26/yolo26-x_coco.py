# SPDX-License-Identifier: Apache-2.0
"""YOLO26 x on COCO."""

_base_ = './yolo26-l_coco.py'

model = dict(
    backbone=dict(widen_factor=1.5),
    neck=dict(widen_factor=1.5),
    bbox_head=dict(widen_factor=1.5),
)
