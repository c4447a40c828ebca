# SPDX-License-Identifier: Apache-2.0
"""YOLO26 s on COCO."""

_base_ = './yolo26-l_coco.py'

model = dict(
    backbone=dict(deepen_factor=0.5, widen_factor=0.5, max_channels=1024, c3k_everywhere=False),
    neck=dict(deepen_factor=0.5, widen_factor=0.5, max_channels=1024),
    bbox_head=dict(widen_factor=0.5, max_channels=1024),
)
