"""Common settings of these detectors: data, AdamW, bf16, 40 epochs on distorted images and 24 on plain ones."""

_base_ = ['../_base_/datasets/bccd_instance.py', 'mmdet::_base_/default_runtime.py']

distorted, plain = 40, 24
max_epochs = distorted + plain
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    # One parameter group per rule instead of one per parameter makes the optimizer several times faster.
    constructor='mmzsq.GroupedOptimWrapperConstructor',
    optimizer=dict(type='AdamW', lr=2e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=5, norm_type=2),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
warm_up = 3
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, end=warm_up, by_epoch=True, convert_to_iter_based=True),
    dict(
        type='CosineRestartLR',
        periods=[distorted - warm_up, plain],
        restart_weights=[1.0, 0.5],
        eta_min=0.0,
        begin=warm_up,
        end=max_epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
# The last epochs use plain images, as in inference. Otherwise any further training on these images would improve the
# detector, quantized or not, and the BatchNorm statistics would include tints and borders that no image has.
custom_hooks = [
    dict(
        type='PipelineSwitchHook',
        switch_epoch=distorted,
        switch_pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=False),
            dict(type='Resize', scale={{_base_.image_size}}, keep_ratio=True),
            dict(type='RandomFlip', prob=0.5),
            dict(type='RandomFlip', prob=0.5, direction='vertical'),
            dict(type='PackDetInputs'),
        ],
    )
]
default_hooks = dict(checkpoint=dict(interval=max_epochs, max_keep_ckpts=1), logger=dict(interval=20))
randomness = dict(seed=0)
