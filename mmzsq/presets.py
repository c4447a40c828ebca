# SPDX-License-Identifier: Apache-2.0
"""What a config does not say: the two complete sets of defaults of the ``zsq`` section.

``default`` is the best label-free recipe measured in this project. ``paper`` repeats the paper (its YOLOv5
settings, and what its authors' code does where the two differ); leaves of other architectures override its numbers.
"""

from __future__ import annotations

from typing import Any

_CALIBRATION_SET = dict(dir=None, num_images=2000, batch_size=32, seed=0)

_ADAPTIVE = dict(
    type='mmzsq.AdaptiveLabelSampler',
    start=dict(type='mmzsq.SingleBoxSampler', side=(0.2, 0.8)),
    warmup=800,
    interval=50,
    score_thr=0.2,
    add_iou=0.35,
    remove_iou=0.35,
    area=(0.01, 0.85),
)

_CUTOUT = dict(probability=0.5, area=(0.02, 0.2), ratio=(0.3, 3.3), value=0.0)

DEFAULT: dict[str, Any] = dict(
    quantizer=dict(
        type='mmzsq.LSQ',
        w_bits=8,
        a_bits=8,
        weight=dict(scheme='signed', per_channel=True, init='mse'),
        activation=dict(scheme='offset', init='mse'),
        step='log',
        first_bits=8,
        last_bits=8,
    ),
    calibration_set=_CALIBRATION_SET,
    label_sampler=_ADAPTIVE,
    synthesis=dict(
        relabel=dict(image_size=160, iterations=1500, batch_size=128),
        synthesise=dict(image_size=640, iterations=800, batch_size=64),
        priors=[
            dict(type='mmzsq.BNStatisticsPrior', form='kl', weight=1.0),
            dict(type='mmzsq.TotalVariationPrior', weight=5e-4),
        ],
        detection_weight=0.5,
        detection_reduction='sum',
        lr=0.2,
        betas=(0.9, 0.999),
        cutout=_CUTOUT,
        clamp=True,
        keep='last',
        precision='bf16',
        capture=True,
    ),
    distillation=dict(
        detection_weight=0.0,
        losses=[
            dict(type='mmzsq.DensePredictionLoss', loss_weight=1.0),
            dict(type='mmzsq.FeatureMSELoss', modules=['type:_BatchNorm'], loss_weight=1.0, normalise=True),
        ],
    ),
    train=dict(
        max_epochs=20,
        batch_size=16,
        num_workers=2,
        optimizer=dict(type='Adam', lr=2e-4),
        step_lr=2e-3,
        schedule='cosine',
        final_lr_ratio=0.0,
        bn='frozen',
        ema=None,
        clip_grad=10.0,
        amp=False,
        init_batches=4,
    ),
)

PAPER: dict[str, Any] = dict(
    quantizer=dict(
        type='mmzsq.LSQ',
        w_bits=8,
        a_bits=8,
        weight=dict(scheme='signed', per_channel=False, init='lsq'),
        activation=dict(scheme='signed', init='lsq'),
        step='linear',
        first_bits=None,
        last_bits=None,
    ),
    calibration_set=_CALIBRATION_SET,
    label_sampler=_ADAPTIVE,
    synthesis=dict(
        relabel=dict(image_size=160, iterations=2500, batch_size=64),
        synthesise=dict(image_size=640, iterations=2500, batch_size=32),
        priors=[
            dict(type='mmzsq.BNStatisticsPrior', form='l2', weight=0.01, first_weight=2.0),
            dict(type='mmzsq.TotalVariationPrior', weight=5e-4),
        ],
        detection_weight=0.5,
        detection_reduction='sum',
        lr=0.2,
        betas=(0.9, 0.999),
        cutout=_CUTOUT,
        clamp=True,
        keep='best',
        keep_interval=50,
        precision='fp32',
        capture=True,
    ),
    distillation=dict(
        detection_weight=0.04,
        losses=[
            dict(type='mmzsq.PredictionKLLoss', tau=4.0, loss_weight=0.1),
            dict(type='mmzsq.FeatureMSELoss', modules=['type:Conv2d', 'type:_BatchNorm'], loss_weight=1.0),
        ],
    ),
    train=dict(
        max_epochs=100,
        batch_size=32,
        num_workers=2,
        optimizer=dict(type='Adam', lr=1e-4, weight_decay=5e-4),
        step_lr=None,
        schedule='linear',
        final_lr_ratio=0.01,
        bn='train',
        ema=0.9999,
        clip_grad=10.0,
        amp=True,
        init_batches=1,
    ),
)

PRESETS: dict[str, dict[str, Any]] = dict(default=DEFAULT, paper=PAPER)
