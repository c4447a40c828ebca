"""Settings for MMDetection's one-stage detectors, except the bits: ``zsq = {{_base_.one_stage}}``.

A step takes two to four times as long as one of YOLOv5, so these settings make half as many images as the preset. In
the paper, that cost at most 0.7 AP (its Table 7).
"""

one_stage = dict(
    presets=dict(
        default=dict(
            calibration_set=dict(num_images=1000),
            synthesis=dict(
                relabel=dict(batch_size=64),
                refine=dict(batch_size=32),
                synthesize=dict(batch_size=32),
            ),
        )
    )
)
