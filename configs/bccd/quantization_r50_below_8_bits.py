"""As ``quantization_r50.py``, with a rate between those of detectors of one stage and of transformers."""

_base_ = './quantization_r50.py'
blood_cells = dict(train=dict(optimizer=dict(lr=2e-5)))
