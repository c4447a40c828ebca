"""Ablation: images of ``default`` with the paper's BatchNorm prior."""

_base_ = ['../yolov5-n_w8a8.py']
zsq = dict(
    synthesis=dict(
        priors=[
            dict(type='mmzsq.BNStatisticsPrior', form='l2', weight=0.01, first_weight=2.0),
            dict(type='mmzsq.TotalVariationPrior', weight=0.1),
        ]
    )
)
