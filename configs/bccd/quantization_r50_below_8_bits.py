"""As ``quantization_r50.py``, with a learning rate between those of one-stage detectors and of transformers."""

_base_ = './quantization_r50.py'
blood_cells = dict(train=dict(optimizer=dict(lr=2e-5)))
