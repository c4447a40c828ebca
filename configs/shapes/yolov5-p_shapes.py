# SPDX-License-Identifier: Apache-2.0
"""YOLOv5 at half the width of size n, on drawn scenes: the detector that ships in the package.

Training it from nothing takes about half an hour on two CPU cores.
"""

_base_ = ['mmdet::_base_/default_runtime.py', '../_base_/datasets/shapes_detection.py']

custom_imports = dict(imports=['mmzsq'], allow_failed_imports=False)

deepen_factor, widen_factor = 0.33, 0.125
max_epochs = 3

model = dict(
    type='mmzsq.YOLOv5',
    data_preprocessor=dict(
        type='DetDataPreprocessor',
        mean=[0.0, 0.0, 0.0],
        std=[255.0, 255.0, 255.0],
        bgr_to_rgb=True,
        pad_size_divisor=32,
    ),
    backbone=dict(type='mmzsq.YOLOv5CSPDarknet', deepen_factor=deepen_factor, widen_factor=widen_factor),
    neck=dict(type='mmzsq.YOLOv5PAFPN', deepen_factor=deepen_factor, widen_factor=widen_factor),
    bbox_head=dict(
        type='mmzsq.YOLOv5Head',
        num_classes=8,
        widen_factor=widen_factor,
        # The mean boxes of nine clusters of the training scenes.
        anchors=[
            [(20, 20), (26, 26), (34, 34)],
            [(45, 44), (57, 56), (70, 70)],
            [(88, 88), (109, 109), (132, 132)],
        ],
    ),
)

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=3e-3, weight_decay=0.02),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=300),
    dict(
        type='CosineAnnealingLR',
        T_max=max_epochs,
        end=max_epochs,
        eta_min=2e-5,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
custom_hooks = [
    dict(
        type='EMAHook',
        ema_type='ExpMomentumEMA',
        momentum=0.001,
        gamma=300,
        update_buffers=True,
    )
]

train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(
    logger=dict(interval=100),
    checkpoint=dict(interval=1, max_keep_ckpts=1),
)
randomness = dict(seed=0)
