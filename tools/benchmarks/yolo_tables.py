# SPDX-License-Identifier: Apache-2.0
"""What docs/results.md reports of YOLOv5-n: the paper's Tables 2 and 4 to 8, two of ours, and how our numbers are made.

All of it is data. A calibration set is made once a seed and serves every student that names it. A method is a recipe
for a student: a config, settings on top of it, and the images it learns from. A cell of a table is one accuracy of a
method at a bit width; two tables with the same cell share the run. yolo.py runs them, results_page.py writes the page.

Sets have 512 images in place of the paper's 2000, ``paper`` has fewer iterations and epochs than the paper, and all
methods of a preset take as many steps of training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Options = Mapping[str, Any]
"""Settings by their dotted keys, as of ``--cfg-options``."""

BITS = ('w8a8', 'w6a6', 'w5a5', 'w4a8', 'w4a4')
PRESETS = ('default', 'paper')
IMAGES = 512
REAL_IMAGES = 337
"""Of train2017 in ``data/coco``."""
FEW_REAL_IMAGES = 64
SIZES = (64, 128, 256, 512, 1024, 2048)
BATCH_AND_EPOCHS = dict(default=(16, 20), paper=(32, 12))
"""Of training on a set of :data:`IMAGES`."""
COMPARISON = 'configs/zsq/comparison/yolov5-n_{}.py'
SYNTHESIS: dict[str, Options] = dict(
    default={}, paper={'zsq.synthesis.relabel.iterations': 800, 'zsq.synthesis.synthesise.iterations': 300}
)
WARMUP: dict[str, Options] = dict(default={}, paper={'zsq.label_sampler.warmup': 300})

OBJECTS_AN_IMAGE = (
    *(27, 49, 36, 34, 21, 20, 15, 16, 10, 6, 10, 10, 11, 8, 7, 5, 8, 5, 2, 5, 4, 4, 4, 2, 1, 1, 0, 3, 0, 1, 0, 1, 2, 2),
    *(0, 1, 0, 1, 0, 1, 0, 1),
)
"""Real images of train2017 with one object, two, three, and so on, crowds left out: "in distribution"."""


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
    # Objects of a few pixels are not to be seen in the small images that labels are corrected on.
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
    'zsq.synthesis.synthesise.iterations': 0,
    'zsq.synthesis.init': 'normal',
}


@dataclass(frozen=True)
class Images:
    """A calibration set, less its seed.

    Attributes:
        name: Its own.
        num_images: How many.
        options: Settings that it is made with, the preset included.
        config: That it is made with; None: the leaf of the detector.
    """

    name: str
    num_images: int
    options: Options
    config: str | None = None


@dataclass(frozen=True)
class Method:
    """A recipe for a student, less its bits and seed.

    Attributes:
        name: Its own; of files it is a part.
        options: Settings of the student beside those of its images.
        images: The calibration set; None: real images.
        config: Path in the repository, ``{bits}`` in it for the bits that it has of its own; None: that of the images,
            and where these have none, the leaf of the bits.
    """

    name: str
    options: Options = field(default_factory=dict)
    images: Images | None = None
    config: str | None = None

    def config_for(self, bits: str) -> tuple[str, Options]:
        """Config of the student at these bits, and the settings that give it the bits."""
        config = self.config or (self.images.config if self.images is not None else None)
        if config is None:
            return f'configs/zsq/yolov5-n_{bits}.py', {}
        if '{bits}' in config:
            return config.format(bits=bits), {}
        return config, {'zsq.quantizer.w_bits': int(bits[1]), 'zsq.quantizer.a_bits': int(bits[3])}


@dataclass(frozen=True)
class Cell:
    """One accuracy.

    Attributes:
        method: Name of a method.
        bits: One of :data:`BITS`.
        metric: Row of ``results.json``: ``'zero_shot'`` is the student, ``'ptq'`` what it starts from, ``'float'`` the
            teacher.
    """

    method: str
    bits: str
    metric: str = 'zero_shot'


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        labels: Texts of its first columns.
        cells: Our accuracies.
        paper: The paper's, as text; empty where it has none.
    """

    labels: tuple[str, ...]
    cells: tuple[Cell, ...]
    paper: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """One table of the paper, with our numbers.

    Attributes:
        number: The paper's; from 9 on, ours.
        title: What is compared.
        heads: Titles of the label columns.
        columns: Titles of our columns.
        paper: Titles of the paper's columns.
        rows: From the top.
        note: What has to be known to read it.
        share: Whether a column says how much of the teacher's AP is left in the first of ours.
    """

    number: int
    title: str
    heads: tuple[str, ...]
    columns: tuple[str, ...]
    paper: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str
    share: bool = False

    @property
    def runs(self) -> list[tuple[str, str]]:
        """Methods and bits of its cells, each once, from the top."""
        return list(dict.fromkeys((cell.method, cell.bits) for row in self.rows for cell in row.cells))


def training(preset: str, images: int) -> Options:
    """Batch and epochs by which ``images`` are shown in as many steps as :data:`IMAGES` are."""
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
    # As many pixels are worked through as in the stages of two.
    *(
        _images(
            preset,
            'one-stage',
            {
                'zsq.synthesis.relabel': None,
                'zsq.synthesis.refine': None,
                'zsq.synthesis.synthesise.iterations': iterations,
                'zsq.label_sampler.warmup': warmup,
                'zsq.label_sampler.interval': interval,
                **rate,
            },
        )
        for preset, iterations, warmup, interval, rate in (
            ('default', 525, 200, 65, {'zsq.synthesis.synthesise.lr': 0.1}),
            ('paper', 350, 112, 14, {}),
        )
    ),
    _images('default', 'three-stages', {}, config=COMPARISON.format('three-stages')),
    _images(
        'paper',
        'three-stages',
        {'zsq.synthesis.synthesise.iterations': 300},
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
"""Every calibration set, the most urgent first."""

_DEFAULT, _PAPER = SETS[:2]

_PARTS: tuple[tuple[str, str, Method], ...] = (
    *(
        ('quantizer', title, _on_set(_DEFAULT, f'default_{name}', **options))
        for title, name, options in (
            ('weights: one step a tensor', 'per-tensor', dict(zsq__quantizer__weight__per_channel=False)),
            ('activations: signed', 'signed', dict(zsq__quantizer__activation__scheme='signed')),
            (
                'first steps: the rule of LSQ',
                'lsq-steps',
                dict(zsq__quantizer__weight__init='lsq', zsq__quantizer__activation__init='lsq'),
            ),
            (
                'steps: learnt as they are, at the rate of weights',
                'linear-steps',
                dict(zsq__quantizer__step='linear', zsq__train__step_lr=None),
            ),
            ('inputs: channels brought to like ranges', 'equalised', dict(zsq__quantizer__equalise=True)),
            (
                'first and last layers: as all others',
                'same-first-last',
                dict(zsq__quantizer__first_bits='same', zsq__quantizer__last_bits='same'),
            ),
        )
    ),
    *(
        ('training', title, _on_set(_DEFAULT, f'default_{name}', config and COMPARISON.format(config), **options))
        for title, name, config, options in (
            ('steps: at the rate of weights', 'one-rate', None, dict(zsq__train__step_lr=None)),
            (
                "rate: in proportion to the size of a layer's weights",
                'relative-rate',
                None,
                dict(zsq__train__relative_lr=True),
            ),
            ('rate: twice as high', 'double-rate', None, dict(zsq__train__optimizer__lr=2e-4)),
            ('rate: constant', 'constant-rate', None, dict(zsq__train__schedule='constant')),
            ('BatchNorm: learns', 'bn-train', None, dict(zsq__train__bn='train')),
            ('augmentation: none', 'plain', None, dict(zsq__train__augmentation=None)),
            ('weights: averaged', 'ema', None, dict(zsq__train__ema=0.999)),
            ('a half of the activations left float at first', 'drop', None, dict(zsq__train__drop__activations=0.5)),
            ('three times as many steps', 'long', None, dict(zsq__train__max_epochs=60)),
            ('predictions: one softmax over a map', 'kl', 'kl-predictions', {}),
            ('features: as they are, not normalised', 'raw-features', 'raw-features', {}),
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
            ('from coarse to fine: without 320 px', 'no-refine', {'zsq.synthesis.refine': None}, IMAGES, None, {}),
            ('erasing: of rectangles, to black, as in `paper`', 'cutout', _CUTOUT, IMAGES, None, {}),
            (
                "erasing: of rectangles, to an image's mean colour",
                'mean-cutout',
                {**_CUTOUT, 'zsq.synthesis.cutout.value': 'mean'},
                IMAGES,
                None,
                {},
            ),
            (
                'labels: start as one box',
                'one-box',
                {'zsq.label_sampler.start.type': 'mmzsq.SingleBoxSampler', 'zsq.label_sampler.start.side': (0.2, 0.8)},
                IMAGES,
                None,
                {},
            ),
            (
                '2048 at 320 px, as many pixels',
                'half-size',
                {'zsq.synthesis.refine': None, 'zsq.synthesis.synthesise.image_size': 320},
                4 * IMAGES,
                None,
                dict(zsq__train__image_size=640),
            ),
        )
    ),
)
"""What is otherwise than in ``default``, where, and the method."""

_MIXED = (
    ('w4a8', 'size of the weights', 'mixed-size'),
    ('w4a4', 'size of the weights', 'mixed-size'),
    ('w5a5', 'bit operations', 'mixed-operations'),
    ('w4a4', 'bit operations', 'mixed-operations'),
)
"""Bits, what is no larger than with these bits in every layer, and the name of the configs with bits of each layer."""

SETS = (*SETS, *(method.images for *_, method in _PARTS if method.images not in (None, _DEFAULT)))

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
        *(method for *_, method in _PARTS),
        *(_on_set(_DEFAULT, f'default_{name}', COMPARISON.format(f'{name}_{{bits}}')) for *_, name in _MIXED),
    )
}
"""Every method, by name."""


def student_options(method: Method, bits: str) -> Options:
    """Settings of a student on top of its config, less the seed and the place of its images."""
    _, of_bits = method.config_for(bits)
    of_images = {} if method.images is None else set_options(method.images)
    return {**of_images, **of_bits, **method.options}


def set_options(images: Images) -> Options:
    """Settings of a calibration set on top of its config, less the seed and its place."""
    return {**images.options, 'zsq.calibration_set.num_images': images.num_images}


def _shown(bits: str) -> str:
    return bits.upper()


def _by_bits(numbers: Sequence[str], bits: Sequence[str]) -> dict[str, tuple[str]]:
    return {width: (number,) for width, number in zip(bits, numbers, strict=True)}


_QAT_BITS = ('w8a8', 'w6a6', 'w5a5', 'w4a8', 'w4a4')
_LOW_BITS = ('w6a6', 'w5a5', 'w4a4')

_TABLE_2: tuple[tuple[str, str, str, dict[str, tuple[str]]], ...] = (
    (
        *('LSQ', f'{REAL_IMAGES} real', f'paper_lsq-real{REAL_IMAGES}'),
        _by_bits(('35.7 / 54.9', '31.5 / 49.9', '26.9 / 44.9', '', '23.3 / 40.0'), _QAT_BITS),
    ),
    (
        *('LSQ+', f'{REAL_IMAGES} real', f'paper_lsq-plus-real{REAL_IMAGES}'),
        _by_bits(('35.4 / 54.6', '32.3 / 50.9', '27.0 / 44.9', '', '23.3 / 40.2'), _QAT_BITS),
    ),
    (
        *('LSQ', f'{FEW_REAL_IMAGES} real', f'paper_lsq-real{FEW_REAL_IMAGES}'),
        _by_bits(('31.6 / 50.6', '28.9 / 47.2', '24.7 / 42.2', '', '17.2 / 32.2'), _QAT_BITS),
    ),
    (
        *('LSQ+', f'{FEW_REAL_IMAGES} real', f'paper_lsq-plus-real{FEW_REAL_IMAGES}'),
        _by_bits(('31.5 / 50.3', '28.6 / 46.7', '25.0 / 42.9', '', '17.3 / 32.1'), _QAT_BITS),
    ),
    ('`paper`, distilled', f'{REAL_IMAGES} real', f'paper_real{REAL_IMAGES}', {}),
    ('`default`, distilled', f'{REAL_IMAGES} real', f'default_real{REAL_IMAGES}', {}),
    (
        *('`paper`, labels of real images', f'{IMAGES} synthetic', 'paper_real-labels'),
        _by_bits(('35.8 / 55.0', '32.7 / 51.4', '28.0 / 45.8', '33.0', '19.0 / 33.4'), _QAT_BITS),
    ),
    (
        *('`paper`, zero-shot', f'{IMAGES} synthetic', 'paper'),
        _by_bits(('32.0 / 50.0', '26.1 / 42.3', '15.0 / 27.0'), _LOW_BITS),
    ),
    ('`default`, zero-shot', f'{IMAGES} synthetic', 'default', {}),
)

_TABLE_4: tuple[tuple[str, str, str, str, dict[str, tuple[str]]], ...] = (
    (
        *('LSQ, PTQ only', 'real', f'paper_lsq-real{REAL_IMAGES}', 'ptq'),
        _by_bits(('29.5 / 48.2', '11.9 / 23.9', '1.3 / 3.6'), _LOW_BITS),
    ),
    (
        *('LSQ+, PTQ only', 'real', f'paper_lsq-plus-real{REAL_IMAGES}', 'ptq'),
        _by_bits(('29.6 / 48.5', '12.2 / 24.5', '1.2 / 3.5'), _LOW_BITS),
    ),
    ('`paper`, PTQ only', 'synthetic', 'paper', 'ptq', {}),
    ('`default`, PTQ only', 'real', f'default_real{REAL_IMAGES}', 'ptq', {}),
    ('`default`, PTQ only', 'synthetic', 'default', 'ptq', {}),
    (
        *('`paper`, labels of real images', 'synthetic', 'paper_real-labels', 'zero_shot'),
        _by_bits(('32.7 / 51.4', '28.0 / 45.8', '19.0 / 33.4'), _LOW_BITS),
    ),
    ('`paper`, zero-shot', 'synthetic', 'paper', 'zero_shot', {}),
    ('`default`, zero-shot', 'synthetic', 'default', 'zero_shot', {}),
)

_TABLE_5: tuple[tuple[str, str, str, str, dict[str, tuple[str]]], ...] = (
    (
        *('real labels', 'yes', 'yes', '_real-labels'),
        _by_bits(('32.7 / 51.4', '28.0 / 45.8', '19.0 / 33.4'), _LOW_BITS),
    ),
    ('Gaussian noise', 'no', 'no', '_noise', _by_bits(('diverges',) * 3, _LOW_BITS)),
    (
        *('Tile, out of distribution', 'no', 'no', '_tile-out'),
        _by_bits(('23.9 / 39.0', '16.1 / 27.9', '5.4 / 11.1'), _LOW_BITS),
    ),
    (
        *('Tile, in distribution', 'no', 'yes', '_tile-in'),
        _by_bits(('24.0 / 39.3', '17.7 / 31.0', '6.8 / 13.4'), _LOW_BITS),
    ),
    (
        *('MultiSample, out of distribution', 'no', 'no', '_multi-out'),
        _by_bits(('28.2 / 46.7', '21.9 / 37.3', '11.9 / 22.3'), _LOW_BITS),
    ),
    (
        *('MultiSample, in distribution', 'no', 'yes', '_multi-in'),
        _by_bits(('29.7 / 48.0', '22.5 / 37.4', '13.1 / 23.3'), _LOW_BITS),
    ),
    ('false-positive sampling', 'no', 'no', '_false-positives', {}),
    (
        *('adaptive sampling', 'no', 'no', ''),
        _by_bits(('32.0 / 50.0', '26.1 / 42.3', '15.0 / 27.0'), _LOW_BITS),
    ),
    ("adaptive sampling from the detector's prior (ours)", 'no', 'no', '_prior', {}),
)

_TABLE_6: tuple[tuple[str, str, dict[str, tuple[str]]], ...] = (
    ('one', '_one-stage', _by_bits(('30.6 / 48.8', '25.2 / 41.1', '16.0 / 27.9'), _LOW_BITS)),
    ('two', '', _by_bits(('32.1 / 50.1', '26.3 / 42.3', '15.8 / 28.1'), _LOW_BITS)),
    ('three', '_three-stages', _by_bits(('31.7 / 49.3', '26.1 / 42.5', '15.7 / 27.8'), _LOW_BITS)),
)

_SIZE_BITS = ('w4a4', 'w5a5', 'w6a6', 'w8a8')
_TABLE_7 = {1024: ('18.3', '27.8', '32.6', '35.6'), 2048: ('19.0', '27.4', '32.7', '35.4')}

_TABLE_8: tuple[tuple[str, tuple[str, str, str], str, tuple[str]], ...] = (
    ('`paper`', ('yes', 'yes', 'yes'), 'paper', ('19.0 / 33.4',)),
    ('`paper`', ('', 'yes', 'yes'), 'paper_without-features', ('16.8 / 30.1',)),
    ('`paper`', ('', '', 'yes'), 'paper_detection-alone', ('11.8 / 21.5',)),
    ('`default`', ('yes', 'yes', ''), 'default', ('',)),
    ('`default`', ('yes', 'yes', 'yes'), 'default_with-detection', ('',)),
    ('`default`', ('', 'yes', ''), 'default_predictions-alone', ('',)),
    ('`default`', ('yes', '', ''), 'default_features-alone', ('',)),
    ('`default`', ('', '', 'yes'), 'default_detection-alone', ('',)),
)

_PART_BITS = ('w4a8', 'w4a4')

_THEIRS = 'the paper, another detector: YOLOv5-s'

TABLES: dict[int, Table] = {
    table.number: table
    for table in (
        Table(
            2,
            'Comparison with training on real images',
            ('bits', 'method', 'images'),
            ('YOLOv5-n',),
            (_THEIRS,),
            (
                Row(('FP32', 'teacher', ''), (Cell('default', 'w8a8', 'float'),), ('37.4 / 56.8',)),
                *(
                    Row((_shown(bits), title, images), (Cell(method, bits),), theirs.get(bits, ('',)))
                    for bits in _QAT_BITS
                    for title, images, method, theirs in _TABLE_2
                ),
            ),
            'LSQ and LSQ+ have the quantizer of `paper`, LSQ+ with offset activations, and learn from real labels '
            'by the detection loss alone; the paper trains them on 120000 and on 2000 real images. What it calls '
            '"Ours" in its Table 2 is `paper` with labels of real images; its number beside `paper`, zero-shot, is '
            'that of its Table 5.',
            share=True,
        ),
        Table(
            4,
            'Comparison with post-training quantization',
            ('bits', 'method', 'images'),
            ('YOLOv5-n',),
            (_THEIRS,),
            tuple(
                Row((_shown(bits), title, images), (Cell(method, bits, metric),), theirs.get(bits, ('',)))
                for bits in _QAT_BITS
                for title, images, method, metric, theirs in _TABLE_4
            ),
            'PTQ is the student as it is initialised, from one batch of 32 images with `paper` and four of 16 with '
            '`default`. It is measured in the runs of Table 2.',
        ),
        Table(
            5,
            'Calibration sets',
            ('bits', 'calibration set', 'real labels', 'real numbers of objects'),
            ('`paper`', '`default`'),
            (_THEIRS,),
            tuple(
                Row(
                    (_shown(bits), title, labels, counts),
                    tuple(Cell(f'{preset}{name}', bits) for preset in ('paper', 'default')),
                    theirs.get(bits, ('',)),
                )
                for bits in _LOW_BITS
                for title, labels, counts, name, theirs in _TABLE_5
            ),
            'In distribution, the numbers of objects an image are drawn from those of the real training images; out'
            ' of it, they are even from 1 to 10, of Tile from 1 to 9. Sides of boxes are even from 0.2 to 0.8 of '
            'the image, of Tile from 0.2 to 0.8 of a cell. The paper shows false-positive sampling in figures '
            'alone. Ours starts from categories by the biases of the head, sizes by the anchors, 1 to 15 objects an '
            'image.',
        ),
        Table(
            6,
            'Stages of adaptive sampling',
            ('stages', 'bits'),
            ('`paper`', '`default`'),
            (_THEIRS,),
            tuple(
                Row(
                    (title, _shown(bits)),
                    tuple(Cell(f'{preset}{name}', bits) for preset in ('paper', 'default')),
                    theirs[bits],
                )
                for title, name, theirs in _TABLE_6
                for bits in _LOW_BITS
            ),
            'One: images and labels together, at full size, as many pixels as the stages of two. Two: labels first,'
            ' then images of them. Three: images of random labels, one correction with the images fixed, then '
            'images of what became of the labels.',
        ),
        Table(
            7,
            'Number of images',
            ('preset', 'images'),
            tuple(map(_shown, _SIZE_BITS)),
            tuple(f'{_shown(bits)}, {_THEIRS}' for bits in _SIZE_BITS),
            tuple(
                Row(
                    (f'`{preset}`', str(size)),
                    tuple(Cell(preset if size == IMAGES else f'{preset}_{size}', bits) for bits in _SIZE_BITS),
                    _TABLE_7.get(size, ('',) * 4) if preset == 'paper' else ('',) * 4,
                )
                for preset in ('paper', 'default')
                for size in SIZES
            ),
            'All sizes are trained on for as many steps: the fewer the images, the more epochs. The numbers of the '
            'paper are those of 1000 and of 2000 images with labels of real ones.',
        ),
        Table(
            8,
            'Losses of training, at W4A4',
            ('preset', 'features', 'predictions', 'detection loss'),
            ('YOLOv5-n',),
            (_THEIRS,),
            tuple(
                Row((preset, *losses), (Cell(method, 'w4a4'),), theirs) for preset, losses, method, theirs in _TABLE_8
            ),
            'Where the detection loss is learnt, `default` goes without its augmentation: labels would no longer fit.',
        ),
        Table(
            9,
            'What each part of `default` is worth',
            ('part', 'otherwise'),
            tuple(map(_shown, _PART_BITS)),
            (),
            (
                Row(('', '`default`'), tuple(Cell('default', bits) for bits in _PART_BITS)),
                *(
                    Row((part, title), tuple(Cell(method.name, bits) for bits in _PART_BITS))
                    for part, title, method in _PARTS
                ),
            ),
            'Ours, not in the paper. One thing is otherwise in each row, and all else as in `default`. Rows of the '
            'part "images" have a calibration set of their own. Those run with erasing, as the list below says, stand '
            'beside the row of erasing, not beside `default`.',
        ),
        Table(
            10,
            'Bits of each layer by its sensitivity',
            ('bits', 'no larger than with these bits in every layer'),
            ('the same in every layer', 'by sensitivity'),
            (),
            tuple(
                Row((_shown(bits), budget), (Cell('default', bits), Cell(f'default_{name}', bits)))
                for bits, budget, name in _MIXED
            ),
            'Ours, not in the paper. `tools/analysis_tools/allocate_bits.py` measured on the synthetic images of seed 0'
            ' how much the loss grows with few bits in one layer alone, and wrote the configs with the bits of each '
            'layer; their first lines are its commands. Bits of weights alone are chosen where their size is the '
            'budget, of weights and inputs where bit operations are. First and last layers have 8 bits in all.',
        ),
    )
}
"""By the paper's number; 9 and 10 are ours."""

SUMMARY = (
    (f'{REAL_IMAGES} real images and their labels, LSQ', dict.fromkeys(BITS, f'paper_lsq-real{REAL_IMAGES}')),
    ("zero-shot, the paper's recipe cut short", dict.fromkeys(BITS, 'paper')),
    ('zero-shot', dict.fromkeys(BITS, 'default')),
    (
        'zero-shot, bits of each layer by its sensitivity: no larger (W4A8), no more bit operations (W5A5, W4A4)',
        dict(w5a5='default_mixed-operations', w4a8='default_mixed-size', w4a4='default_mixed-operations'),
    ),
)
"""What README.md shows: the text of each row, and its method by bits."""
