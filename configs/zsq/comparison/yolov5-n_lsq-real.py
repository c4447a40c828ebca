"""Not zero-shot: the paper's LSQ baseline, on the real training images and labels, without distillation."""

_base_ = ['./yolov5-n_real.py']
zsq = dict(preset='paper', distillation=dict(detection_weight=1.0, losses=[]))
