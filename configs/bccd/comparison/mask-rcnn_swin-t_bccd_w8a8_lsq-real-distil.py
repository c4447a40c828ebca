"""Not zero-shot: the same distillation on the real training images."""

_base_ = ['../mask-rcnn_swin-t_bccd_w8a8.py']
# 37 steps per epoch.
zsq = dict(calibration_set=dict(real={{_base_.train_dataloader.dataset}}), train=dict(max_epochs=7))
