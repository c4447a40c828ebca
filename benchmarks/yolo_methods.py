# SPDX-License-Identifier: Apache-2.0
"""Calibration sets and training recipes behind the YOLOv5-n numbers of docs/results.md.

This module is data. A calibration set is made once per seed and serves every student that names it. A method is the
recipe of a student: a config, settings on top of it, and its training images. yolo_tables.py lists the tables that show
a method, yolo.py runs it.

Sets have 512 images instead of the paper's 2000, and ``paper`` has fewer iterations and epochs than the paper. All
methods of a preset take the same number of training steps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

Options = Mapping[str, Any]
"""Settings by dotted key, as in ``--cfg-options``."""

BITS = ('w8a8', 'w6a6', 'w5a5', 'w4a8', 'w4a4')
PRESETS = ('default', 'paper')
IMAGES = 512
REAL_IMAGES = 337
"""Number of images of train2017 in ``data/coco``."""
FEW_REAL_IMAGES = 64
SIZES = (64, 128, 256, 512, 1024, 2048)
BATCH_AND_EPOCHS = dict(default=(16, 20), paper=(32, 12))
"""Batch size and epochs of training on a set of :data:`IMAGES`."""
COMPARISON = 'configs/zsq/comparison/yolov5-n_{}.py'
LAYER_BITS = Path(__file__).parent / 'results' / 'yolov5-n_bits.json'
SYNTHESIS: dict[str, Options] = dict(
    default={}, paper={'zsq.synthesis.relabel.iterations': 800, 'zsq.synthesis.synthesize.iterations': 300}
)
WARMUP: dict[str, Options] = dict(default={}, paper={'zsq.label_sampler.warmup': 300})

OBJECTS_AN_IMAGE = (
    *(27, 49, 36, 34, 21, 20, 15, 16, 10, 6, 10, 10, 11, 8, 7, 5, 8, 5, 2, 5, 4, 4, 4, 2, 1, 1, 0, 3, 0, 1, 0, 1, 2, 2),
    *(0, 1, 0, 1, 0, 1, 0, 1),
)
"""Histogram of the number of objects (1, 2, 3, ...) in real images of train2017, without crowds."""


def _sampler(name: str, **arguments: Any) -> Options:
    return {
        'zsq.label_sampler.type': f'mmzsq.{name}',
        **{f'zsq.label_sampler.{key}': value for key, value in arguments.items()},
    }


_MULTI_START = {
    'zsq.label_sampler.start.type': 'mmzsq.MultiBoxSampler',
    'zsq.label_sampler.start.num_boxes': (1, 5),
    'zsq.label_sampler.start.side': (0.1, 0.6),
}
_PRIOR_START = {
    'zsq.label_sampler.start.type': 'mmzsq.DetectorPriorSampler',
    # Objects of a few pixels are invisible in the small images of relabeling.
    'zsq.label_sampler.remove_iou': 0.0,
}
_CUTOUT = {
    'zsq.synthesis.cutout.probability': 0.5,
    'zsq.synthesis.cutout.area': (0.02, 0.2),
    'zsq.synthesis.cutout.ratio': (0.3, 3.3),
    'zsq.synthesis.cutout.value': 0.0,
}
_NO_STEPS = {
    'zsq.synthesis.relabel': None,
    'zsq.synthesis.refine': None,
    'zsq.synthesis.synthesize.iterations': 0,
    'zsq.synthesis.init': 'normal',
}


@dataclass(frozen=True)
class Images:
    """Recipe of a calibration set, without its seed.

    Attributes:
        name: Unique name.
        num_images: Number of images.
        options: Settings, including the preset.
        config: Path of the config; None uses the leaf config of the detector.
    """

    name: str
    num_images: int
    options: Options
    config: str | None = None


@dataclass(frozen=True)
class Method:
    """Recipe of a student, without its bits and seed.

    Attributes:
        name: Unique name, used in file names.
        options: Settings of the student on top of those of its images.
        images: The calibration set; None uses real images.
        config: Path in the repository; None uses the config of the images, or else the leaf config of the bits.
        layer_bits: Prefix of the keys in ``results/yolov5-n_bits.json`` with the bits of each layer; None uses the same
            bits in all layers.
    """

    name: str
    options: Options = field(default_factory=dict)
    images: Images | None = None
    config: str | None = None
    layer_bits: str | None = None

    def config_for(self, bits: str) -> tuple[str, Options]:
        """Return the config of the student, and the settings that give it these bits."""
        config = self.config or (self.images.config if self.images is not None else None)
        if config is None:
            return f'configs/zsq/yolov5-n_{bits}.py', {}
        return config, {'zsq.quantizer.w_bits': int(bits[1]), 'zsq.quantizer.a_bits': int(bits[3])}


def training(preset: str, images: int) -> Options:
    """Return batch size and epochs that take as many steps with ``images`` as with :data:`IMAGES`."""
    batch, epochs = BATCH_AND_EPOCHS[preset]
    steps = epochs * -(-IMAGES // batch)
    return {'zsq.train.batch_size': batch, 'zsq.train.max_epochs': max(round(steps / -(-images // batch)), 1)}


def _images(preset: str, name: str, options: Options, num_images: int = IMAGES, config: str | None = None) -> Images:
    return Images('_'.join(filter(None, (preset, name))), num_images, {'zsq.preset': preset, **options}, config)


def _on_set(images: Images, name: str | None = None, config: str | None = None, **options: Any) -> Method:
    preset = images.options['zsq.preset']
    own = {key.replace('__', '.'): value for key, value in options.items()}
    return Method(name or images.name, {**training(preset, images.num_images), **own}, images, config)


def _on_real(name: str, preset: str, config: str, images: int) -> Method:
    subset = {} if images == REAL_IMAGES else {'zsq.calibration_set.real.indices': images}
    return Method(
        f'{preset}_{name}{images}',
        {'zsq.preset': preset, **subset, **training(preset, images)},
        config=COMPARISON.format(config),
    )


SETS: tuple[Images, ...] = (
    *(_images(preset, '', {**SYNTHESIS[preset], **WARMUP[preset]}) for preset in PRESETS),
    *(
        _images(preset, f'{size}', {**SYNTHESIS[preset], **WARMUP[preset]}, size)
        for preset in PRESETS
        for size in SIZES
        if size != IMAGES
    ),
    # As many pixels in total as in the two stages of the preset.
    *(
        _images(
            preset,
            'one-stage',
            {
                'zsq.synthesis.relabel': None,
                'zsq.synthesis.refine': None,
                'zsq.synthesis.synthesize.iterations': iterations,
                'zsq.label_sampler.warmup': warmup,
                'zsq.label_sampler.interval': interval,
                **rate,
            },
        )
        for preset, iterations, warmup, interval, rate in (
            ('default', 525, 200, 65, {'zsq.synthesis.synthesize.lr': 0.1}),
            ('paper', 350, 112, 14, {}),
        )
    ),
    _images('default', 'three-stages', {}, config=COMPARISON.format('three-stages')),
    _images(
        'paper',
        'three-stages',
        {'zsq.synthesis.synthesize.iterations': 300},
        config=COMPARISON.format('three-stages'),
    ),
    *(
        _images(preset, name, {**(_NO_STEPS if name == 'noise' else SYNTHESIS[preset]), **sampler})
        for preset in PRESETS
        for name, sampler in (
            (
                'real-labels',
                _sampler('RealLabelSampler', ann_file='data/coco/annotations/instances_train2017.json'),
            ),
            ('noise', _sampler('SingleBoxSampler')),
            ('tile-out', _sampler('TileSampler')),
            ('tile-in', _sampler('TileSampler', count_histogram=OBJECTS_AN_IMAGE)),
            ('multi-out', _sampler('MultiBoxSampler', num_boxes=(1, 10), side=(0.2, 0.8))),
            ('multi-in', _sampler('MultiBoxSampler', count_histogram=OBJECTS_AN_IMAGE, side=(0.2, 0.8))),
            (
                'false-positives',
                dict(
                    default={**_sampler('FalsePositiveSampler', warmup=300, interval=100), **_MULTI_START},
                    paper=_sampler('FalsePositiveSampler', warmup=300, interval=50),
                )[preset],
            ),
            ('prior', {**WARMUP[preset], **_PRIOR_START}),
        )
    ),
)
"""Every calibration set, the most important first."""

_DEFAULT, _PAPER = SETS[:2]

PARTS: tuple[tuple[str, str, Method], ...] = (
    *(
        ('quantizer', title, _on_set(_DEFAULT, f'default_{name}', **options))
        for title, name, options in (
            ('weights: one step per tensor', 'per-tensor', dict(zsq__quantizer__weight__per_channel=False)),
            ('activations: signed', 'signed', dict(zsq__quantizer__activation__scheme='signed')),
            (
                'initial steps: rule of LSQ',
                'lsq-steps',
                dict(zsq__quantizer__weight__init='lsq', zsq__quantizer__activation__init='lsq'),
            ),
            (
                'steps: learned directly, at the learning rate of weights',
                'linear-steps',
                dict(zsq__quantizer__step='linear', zsq__train__step_lr=None),
            ),
            ('inputs: channels equalized', 'equalized', dict(zsq__quantizer__equalize=True)),
            (
                'first and last layers: same bits as all others',
                'same-first-last',
                dict(zsq__quantizer__first_bits='same', zsq__quantizer__last_bits='same'),
            ),
        )
    ),
    *(
        ('training', title, _on_set(_DEFAULT, f'default_{name}', config and COMPARISON.format(config), **options))
        for title, name, config, options in (
            ('steps: at the learning rate of weights', 'one-rate', None, dict(zsq__train__step_lr=None)),
            ('learning rate: doubled', 'double-rate', None, dict(zsq__train__optimizer__lr=2e-4)),
            ('learning rate: constant', 'constant-rate', None, dict(zsq__train__schedule='constant')),
            ('BatchNorm: trained', 'bn-train', None, dict(zsq__train__bn='train')),
            ('augmentation: none', 'plain', None, dict(zsq__train__augmentation=None)),
            ('weights: averaged', 'ema', None, dict(zsq__train__ema=0.999)),
            ('three times as many steps', 'long', None, dict(zsq__train__max_epochs=60)),
            ('predictions: one softmax over each map', 'kl', 'kl-predictions', {}),
            ('features: not normalized', 'raw-features', 'raw-features', {}),
        )
    ),
    *(
        ('images', title, _on_set(_images('default', name, options, size, config), None, None, **own))
        for title, name, options, size, config, own in (
            (
                'BatchNorm prior: Euclidean, as in `paper`',
                'l2-prior',
                {},
                IMAGES,
                COMPARISON.format('l2-prior'),
                {},
            ),
            ('stages: without 320 px', 'no-refine', {'zsq.synthesis.refine': None}, IMAGES, None, {}),
            ('erasing: rectangles, black, as in `paper`', 'cutout', _CUTOUT, IMAGES, None, {}),
            (
                'erasing: rectangles, mean color of the image',
                'mean-cutout',
                {**_CUTOUT, 'zsq.synthesis.cutout.value': 'mean'},
                IMAGES,
                None,
                {},
            ),
            (
                'labels: start with one box',
                'one-box',
                {'zsq.label_sampler.start.type': 'mmzsq.SingleBoxSampler', 'zsq.label_sampler.start.side': (0.2, 0.8)},
                IMAGES,
                None,
                {},
            ),
            (
                '2048 images of 320 px, as many pixels',
                'half-size',
                {'zsq.synthesis.refine': None, 'zsq.synthesis.synthesize.image_size': 320},
                4 * IMAGES,
                None,
                dict(zsq__train__image_size=640),
            ),
        )
    ),
)
"""Changed part of ``default``, the change, and its method."""

_MORE = next(images for images in SETS if images.name == 'default_1024')


def _mixed(name: str, layer_bits: str | None = None, **options: Any) -> tuple[Method, ...]:
    methods = (_on_set(images, f'{images.name}_{name}', **options) for images in (_DEFAULT, _MORE))
    return tuple(replace(method, layer_bits=layer_bits) for method in methods)


MIXED: tuple[tuple[str, str, tuple[Method, ...]], ...] = (
    *(
        (bits, text, _mixed(name, name))
        for bits, text, name in (
            ('w4a8', 'size of the weights', 'mixed-size'),
            ('w4a4', 'size of the weights', 'mixed-size'),
            ('w5a5', 'bit operations', 'mixed-operations'),
            ('w4a4', 'bit operations', 'mixed-operations'),
        )
    ),
    ('w6a6', 'bit operations', _mixed('allocated', zsq__quantizer__allocate__budget='operations')),
)
"""Uniform bits that define a budget, the budget, and the methods with allocated bits, for :data:`IMAGES` and for 1024
images."""

SETS = (*SETS, *(method.images for *_, method in PARTS if method.images not in (None, _DEFAULT)))

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(_on_set(images) for images in SETS),
        *(
            _on_real(name, 'paper', config, images)
            for images in (REAL_IMAGES, FEW_REAL_IMAGES)
            for name, config in (('lsq-real', 'lsq-real'), ('lsq-plus-real', 'lsq-plus-real'))
        ),
        *(_on_real('real', preset, 'real', REAL_IMAGES) for preset in PRESETS),
        _on_set(_PAPER, 'paper_without-features', COMPARISON.format('paper-without-features')),
        _on_set(_PAPER, 'paper_detection-alone', zsq__distillation__losses=()),
        _on_set(_DEFAULT, 'default_with-detection', zsq__distillation__detection_weight=0.04),
        _on_set(_DEFAULT, 'default_predictions-alone', COMPARISON.format('predictions-alone')),
        _on_set(_DEFAULT, 'default_features-alone', COMPARISON.format('features-alone')),
        _on_set(
            _DEFAULT,
            'default_detection-alone',
            zsq__distillation__losses=(),
            zsq__distillation__detection_weight=1.0,
        ),
        *(method for *_, method in PARTS),
        *(method for *_, methods in MIXED for method in methods),
    )
}
"""Every method by name."""


def student_options(method: Method, bits: str) -> Options:
    """Return the settings of a student on top of its config, without the seed and folder of its images."""
    _, of_bits = method.config_for(bits)
    of_images = {} if method.images is None else set_options(method.images)
    of_layers = {'zsq.quantizer.overrides': overrides} if (overrides := layer_overrides(method, bits)) else {}
    return {**of_images, **of_bits, **of_layers, **method.options}


def layer_overrides(method: Method, bits: str) -> dict[str, dict[str, int]]:
    """Return ``zsq.quantizer.overrides`` of a method whose layers have allocated bits; empty for all others."""
    if method.layer_bits is None:
        return {}
    layers = json.loads(LAYER_BITS.read_text(encoding='utf-8'))[f'{method.layer_bits}_{bits}']['layers']
    return {name: dict(w_bits=int(of_layer[1]), a_bits=int(of_layer[3])) for name, of_layer in layers.items()}


def set_options(images: Images) -> Options:
    """Return the settings of a calibration set on top of its config, without the seed and its folder."""
    return {**images.options, 'zsq.calibration_set.num_images': images.num_images}
