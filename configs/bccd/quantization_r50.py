"""As ``quantization.py``, for a detector of two stages whose memory is that of BatchNorm."""

_base_ = './quantization.py'
blood_cells = dict(
    synthesis=dict(
        priors=[
            dict(type='mmzsq.BNStatisticsPrior', form='kl', weight=1.0),
            dict(type='mmzsq.PatchSimilarityPrior', weight=1.0),
            dict(type='mmzsq.TotalVariationPrior', weight=0.01),
        ],
        # Beside a black rectangle BatchNorm sees a bright, even smear as one without contrast.
        cutout=None,
        synthesize=dict(iterations=300),
    )
)
