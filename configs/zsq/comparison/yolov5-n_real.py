"""Not zero-shot: the selected preset on the real training images."""

_base_ = ['../yolov5-n_w8a8.py']
zsq = dict(calibration_set=dict(real={{_base_.train_dataloader.dataset.dataset}}))
