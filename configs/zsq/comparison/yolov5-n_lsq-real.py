"""Not zero-shot: LSQ as the paper compares with, on the real training images and labels, without distillation."""

_base_ = ['./yolov5-n_real.py']
zsq = dict(preset='paper', distillation=dict(detection_weight=1.0, losses=[]))
