"""Not zero-shot: the real training images and labels, and no distillation."""

_base_ = ['./mask-rcnn_r50_bccd_w4a8_lsq-real-distil.py']
zsq = dict(distillation=dict(detection_weight=1.0, losses=[]))
