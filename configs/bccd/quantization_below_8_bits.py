"""As ``quantization.py``, with a learning rate between those of one-stage detectors and of transformers."""

_base_ = './quantization.py'
blood_cells = dict(train=dict(optimizer=dict(lr=5e-5)))
