"""Not zero-shot: LSQ on the real training images and labels, without distillation."""

_base_ = ['./mask-rcnn_r50_bccd_w8a8_lsq-real-distil.py']
zsq = dict(distillation=dict(detection_weight=1.0, losses=[]))
