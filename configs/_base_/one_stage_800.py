"""As ``one_stage.py``, for detectors trained at 800 px, with sizes and batches as in ``two_stage.py``."""

_base_ = './one_stage.py'
one_stage = dict(
    presets=dict(
        default=dict(
            synthesis=dict(relabel=dict(image_size=320, batch_size=32), refine=None, synthesize=dict(batch_size=16)),
            train=dict(batch_size=8),
        )
    )
)
