"""What leaves of MMDetection's detectors of one stage say beside their bits: ``zsq = {{_base_.one_stage}}``.

A step of theirs takes two to four times as long as one of YOLOv5: half as many images as usual, which in the paper
cost at most 0.7 AP (its Table 7).
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
