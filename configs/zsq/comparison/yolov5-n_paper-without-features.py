"""Ablation: the losses of ``paper`` without the feature loss."""

_base_ = ['../yolov5-n_w8a8.py']
zsq = dict(preset='paper', distillation=dict(losses=[dict(type='mmzsq.PredictionKLLoss', tau=4.0, loss_weight=0.1)]))
