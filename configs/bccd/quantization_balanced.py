"""As ``quantization.py``, with the loss terms of the preset ``default``, for detectors with BatchNorm."""

_base_ = './quantization.py'
blood_cells = dict(
    synthesis=dict(
        balance=True,
        detection_weight=1.5,
        detection_reduction='mean',
        detection_interval=None,
        priors=[
            dict(type='mmzsq.BNStatisticsPrior', form='kl', weight=1.0),
            dict(type='mmzsq.TotalVariationPrior', weight=0.1),
        ],
        cutout=None,
        synthesize=dict(iterations=300),
    )
)
