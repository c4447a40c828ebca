"""Ablation: ``default`` with the paper's prediction loss, one softmax over each whole map."""

_base_ = ['../yolov5-n_w8a8.py']
zsq = dict(
    distillation=dict(
        losses=[
            dict(type='mmzsq.PredictionKLLoss', tau=4.0, loss_weight=0.1),
            dict(type='mmzsq.FeatureMSELoss', modules=None, loss_weight=1.0, normalize=True),
        ]
    )
)
