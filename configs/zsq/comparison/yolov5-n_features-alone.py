"""Ablation: the feature loss of ``default`` alone."""

_base_ = ['../yolov5-n_w8a8.py']
zsq = dict(distillation=dict(losses=[dict(type='mmzsq.FeatureMSELoss', modules=None, loss_weight=1.0, normalize=True)]))
