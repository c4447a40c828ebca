"""As ``quantization.py``, with a rate between those of detectors of one stage and of transformers."""

_base_ = './quantization.py'
blood_cells = dict(train=dict(optimizer=dict(lr=5e-5)))
