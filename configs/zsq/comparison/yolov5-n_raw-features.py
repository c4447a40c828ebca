"""Ablation: ``default`` with raw feature errors, not divided by the teacher's mean square."""

_base_ = ['../yolov5-n_w8a8.py']
zsq = dict(
    distillation=dict(
        losses=[
            dict(type='mmzsq.PredictionLoss', loss_weight=1.0),
            dict(type='mmzsq.FeatureMSELoss', modules=None, loss_weight=1.0, normalize=False),
        ]
    )
)
