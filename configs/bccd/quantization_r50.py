"""As ``quantization.py``, for a two-stage detector with BatchNorm."""

_base_ = './quantization.py'
blood_cells = dict(
    synthesis=dict(
        # The loss of two stages stays large. Summed over the images, it would keep the prior from converging.
        detection_weight=0.5,
        detection_reduction='mean',
        priors=[
            dict(type='mmzsq.BNStatisticsPrior', form='kl', weight=1.0),
            dict(type='mmzsq.PatchSimilarityPrior', weight=1.0),
            dict(type='mmzsq.TotalVariationPrior', weight=0.01),
        ],
        # Black rectangles dominate the BatchNorm statistics of a bright, even smear, and cells lose contrast.
        cutout=None,
        synthesize=dict(iterations=300),
    )
)
