"""As ``one_stage.py``, for detectors tested at 608 px."""

_base_ = './one_stage.py'
one_stage = dict(presets=dict(default=dict(synthesis=dict(synthesize=dict(image_size=608)))))
