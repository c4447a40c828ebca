"""Settings for two-stage detectors trained at 800 px, except the bits: ``zsq = {{_base_.two_stage}}``.

Only the preset ``default`` changes, because the weights of the paper's losses suit the paper's sizes and batches.
"""

two_stage = dict(
    presets=dict(
        default=dict(
            synthesis=dict(
                relabel=dict(image_size=320, batch_size=32), refine=None, synthesize=dict(image_size=640, batch_size=16)
            ),
            train=dict(batch_size=8),
        )
    )
)
