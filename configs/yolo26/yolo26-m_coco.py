# SPDX-License-Identifier: Apache-2.0
"""YOLO26 m on COCO."""

_base_ = './yolo26-l_coco.py'

model = dict(
    backbone=dict(deepen_factor=0.5),
    neck=dict(deepen_factor=0.5),
)
