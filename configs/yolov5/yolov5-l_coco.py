# SPDX-License-Identifier: Apache-2.0
"""YOLOv5 l on COCO; the other sizes change the two factors."""

_base_ = ['mmdet::_base_/default_runtime.py', '../_base_/datasets/coco_letterbox.py']

custom_imports = dict(imports=['mmzsq'], allow_failed_imports=False)

model = dict(
    type='mmzsq.YOLOv5',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[0.0, 0.0, 0.0],
        std=[255.0, 255.0, 255.0],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(type='mmzsq.YOLOv5CSPDarknet', deepen_factor=1.0, widen_factor=1.0),
    neck=dict(type='mmzsq.YOLOv5PAFPN', deepen_factor=1.0, widen_factor=1.0),
    bbox_head=dict(type='mmzsq.YOLOv5Head', num_classes=80, widen_factor=1.0),
    test_cfg=dict(
        score_thr=0.001,
        nms=dict(type='nms', iou_threshold=0.6),
        nms_pre=30000,
        max_per_img=300,
    ),
)

max_epochs = 300
base_lr = 0.01  # for a batch of 64

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=10)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
auto_scale_lr = dict(base_batch_size=64)
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='SGD', lr=base_lr, momentum=0.937, weight_decay=5e-4, nesterov=True),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(
        type='LinearLR',
        start_factor=0.001,
        by_epoch=True,
        begin=0,
        end=3,
        convert_to_iter_based=True,
    ),
    dict(
        type='CosineAnnealingLR',
        eta_min=base_lr * 0.01,
        by_epoch=True,
        begin=3,
        end=max_epochs,
        T_max=max_epochs - 3,
        convert_to_iter_based=True,
    ),
]
default_hooks = dict(checkpoint=dict(interval=10, max_keep_ckpts=3))
custom_hooks = [
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.0001, update_buffers=True),
]
