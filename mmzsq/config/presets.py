# SPDX-License-Identifier: Apache-2.0
"""Presets: complete defaults of the ``zsq`` section.

``default`` is the best label-free recipe measured in this project, for any detector. ``instant`` is post-training
quantization on procedural pictures, within minutes and without a GPU. ``reconstruct`` adds learned rounding to it, see
:mod:`mmzsq.quantization.reconstruction`. ``paper`` repeats the paper's
YOLOv5 settings, and follows the authors' code where the two differ. ``paper_transformer`` repeats the paper's Mask
R-CNN with Swin. Leaves of other architectures override single numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from mmzsq.config.sections import ZsqSection

_CALIBRATION_SET = dict(dir=None, source='synthesized', num_images=2000, batch_size=32, seed=0, real=None)

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

_DEFAULT: dict[str, Any] = dict(
    preset='default',
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
    calibration_set=dict(_CALIBRATION_SET, source='auto'),
    label_sampler=dict(
        _ADAPTIVE,
        # Scenes of several objects: the paper's single box leaves most of the image empty.
        start=dict(type='mmzsq.MultiBoxSampler', num_boxes=(1, 5), side=(0.1, 0.6)),
        warmup=300,
        interval=100,
    ),
    synthesis=dict(
        # From coarse to fine: objects take shape while they are a few pixels large. At full size alone they are
        # outlines filled with texture.
        relabel=dict(image_size=None, iterations=800, batch_size=128),
        refine=dict(image_size=None, iterations=300, batch_size=64, start='previous', lr=0.05),
        synthesize=dict(image_size=None, iterations=400, batch_size=64, start='previous', lr=0.05),
        fit_batches=True,
        priors=[
            dict(type='mmzsq.BNStatisticsPrior', form='kl', weight=1.0),
            dict(type='mmzsq.PatchSimilarityPrior', weight=1.0),
            dict(type='mmzsq.TotalVariationPrior', weight=0.1),
        ],
        require_feature_prior=True,
        # Relative to the gradient of the feature priors, for any head and any loss.
        balance=True,
        detection_weight=1.5,
        detection_reduction='mean',
        detection_interval=None,
        lr=0.1,
        warmup=0,
        betas=(0.9, 0.999),
        init='uniform',
        # Erasing gains nothing, and black rectangles cost bright, smooth images their contrast.
        cutout=None,
        clamp=True,
        keep='last',
        precision='bf16',
        capture=True,
    ),
    distillation=dict(
        detection_weight=0.0,
        losses=[
            dict(type='mmzsq.PredictionLoss', loss_weight=1.0),
            dict(type='mmzsq.FeatureMSELoss', modules=None, loss_weight=1.0, normalize=True),
        ],
    ),
    reconstruction=None,
    train=dict(
        max_epochs=20,
        batch_size=16,
        accumulate=1,
        num_workers=2,
        optimizer=dict(type='Adam', lr=1e-4),
        # Weights of YOLOv5, for which the rate was chosen. Those of small depthwise networks are several times larger.
        weight_size=0.04,
        step_lr=2e-3,
        schedule='cosine',
        final_lr_ratio=0.0,
        bn='frozen',
        ema=None,
        clip_grad=10.0,
        amp=False,
        init_batches=4,
        capture=True,
        # The student would overfit a small set: mirror its images, tile four of them, and change their tint.
        augmentation=dict(flip=0.5, mosaic=0.5, color=0.3),
        image_size=None,
        channels_last=False,
    ),
)

INSTANT: dict[str, Any] = dict(
    calibration_set=dict(source='procedural', num_images=64),
    # All images, once.
    train=dict(max_epochs=0, batch_size=8, init_batches=8, augmentation=None),
)
"""Differences of the preset ``instant`` from ``default``."""

DERIVED: dict[str, dict[str, Any]] = dict(instant=INSTANT, reconstruct=dict(INSTANT, reconstruction=dict()))
"""Differences of presets from ``default``. They keep what a leaf changes in ``default`` elsewhere."""


def _derived(name: str) -> dict[str, Any]:
    changes = DERIVED[name]
    return dict(
        _DEFAULT,
        preset=name,
        calibration_set=dict(_DEFAULT['calibration_set'], **changes['calibration_set']),
        reconstruction=changes.get('reconstruction'),
        train=dict(_DEFAULT['train'], **changes['train']),
    )


_PAPER: dict[str, Any] = dict(
    preset='paper',
    quantizer=dict(
        type='mmzsq.LSQ',
        w_bits=8,
        a_bits=8,
        weight=dict(scheme='signed', per_channel=False, init='lsq', narrow=False),
        activation=dict(scheme='signed', init='lsq'),
        step='linear',
        first_bits=None,
        last_bits=None,
        equalize=False,
    ),
    calibration_set=_CALIBRATION_SET,
    label_sampler=_ADAPTIVE,
    synthesis=dict(
        relabel=dict(image_size=160, iterations=2500, batch_size=64),
        refine=None,
        synthesize=dict(image_size=640, iterations=2500, batch_size=32),
        fit_batches=False,
        priors=[
            dict(type='mmzsq.BNStatisticsPrior', form='l2', weight=0.01, first_weight=2.0),
            dict(type='mmzsq.PatchSimilarityPrior', weight=1.0),
            dict(type='mmzsq.TotalVariationPrior', weight=5e-4),
        ],
        require_feature_prior=True,
        balance=False,
        detection_weight=0.5,
        detection_reduction='sum',
        detection_interval=1,
        lr=0.2,
        warmup=0,
        betas=(0.9, 0.999),
        init='uniform',
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
    reconstruction=None,
    train=dict(
        max_epochs=100,
        batch_size=32,
        accumulate=1,
        num_workers=2,
        optimizer=dict(type='Adam', lr=1e-4, weight_decay=5e-4),
        weight_size=None,
        step_lr=None,
        schedule='linear',
        final_lr_ratio=0.01,
        bn='train',
        ema=0.9999,
        clip_grad=10.0,
        amp=True,
        init_batches=1,
        capture=True,
        augmentation=None,
        image_size=None,
        channels_last=False,
    ),
)

_DEVIATION = (58.395 + 57.12 + 57.375) / 3 / 255
"""Standard deviation of the pixels that Swin was trained on, for images in [0, 1]."""

_PAPER_TRANSFORMER: dict[str, Any] = dict(
    preset='paper_transformer',
    # The patch embedding is quantized too.
    quantizer=dict(_PAPER['quantizer'], scope='backbone', first_bits='same'),
    calibration_set=dict(_CALIBRATION_SET, batch_size=12),
    # The paper used labels of real images here (mmzsq.RealLabelSampler).
    label_sampler=_ADAPTIVE,
    synthesis=dict(
        _PAPER['synthesis'],
        relabel=None,
        synthesize=dict(image_size=640, iterations=2000, batch_size=12),
        priors=[
            dict(type='mmzsq.PatchSimilarityPrior', weight=1.0),
            dict(type='mmzsq.TotalVariationPrior', weight=1e-3 / _DEVIATION),
        ],
        detection_weight=10.0,
        detection_reduction='mean',
        # The paper steps by 0.2, and measures variation, in normalized inputs; here images are in [0, 1].
        lr=0.2 * _DEVIATION,
        warmup=100,
        betas=(0.5, 0.9),
        init='normal',
        cutout=None,
        clamp=False,
        keep='last',
    ),
    distillation=dict(
        detection_weight=1.0,
        losses=[
            dict(type='mmzsq.PredictionKLLoss', tau=1.0, loss_weight=1.0, join_maps=True, heads=['rpn_head']),
            dict(type='mmzsq.FeatureMSELoss', modules=['type:SwinBlock'], loss_weight=1.0),
        ],
    ),
    train=dict(
        _PAPER['train'],
        max_epochs=15,
        batch_size=8,
        optimizer=dict(type='AdamW', lr=1e-6, weight_decay=0.05),
        schedule='constant',
        bn='frozen',
        ema=None,
        clip_grad=None,
    ),
)

_SECTIONS = {
    section['preset']: section
    for section in (_DEFAULT, _derived('instant'), _derived('reconstruct'), _PAPER, _PAPER_TRANSFORMER)
}

PRESETS: dict[str, ZsqSection] = {
    name: ZsqSection.parse(section, f'preset {name}') for name, section in _SECTIONS.items()
}


def preset_section(name: str, user: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of a preset.

    Those of ``default`` depend on the bits, on whether the student learns from labels, and on whether the user chose
    the learning rate.

    Args:
        name: A key of :data:`PRESETS`.
        user: The user's ``zsq`` section.
    """
    section = copy.deepcopy(_SECTIONS[name])
    if name != 'default':
        return section
    # Values of a wrong type are refused later, when the section is parsed.
    quantizer, distillation, train = (
        value if isinstance(value := user.get(key), Mapping) else {} for key in ('quantizer', 'distillation', 'train')
    )
    if all(quantizer.get(key, section['quantizer'][key]) == 8 for key in ('w_bits', 'a_bits')):
        # At 8 bits the student starts as good as the teacher, and larger steps only lead it away.
        section['train'] = dict(section['train'], optimizer=dict(type='Adam', lr=2e-5), step_lr=2e-4, weight_size=None)
    if isinstance(optimizer := train.get('optimizer'), Mapping) and 'lr' in optimizer:
        section['train'] = dict(section['train'], weight_size=None)
    if distillation.get('detection_weight'):
        # The detector's own loss reads labels, which augmentation does not move.
        section['train'] = dict(section['train'], augmentation=None)
    return section
