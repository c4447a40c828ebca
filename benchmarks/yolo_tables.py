# SPDX-License-Identifier: Apache-2.0
"""Tables of docs/results.md on YOLOv5-n: the paper's Tables 2 and 4 to 8, and two of our own.

This module is data. A cell is one accuracy of a method of yolo_methods.py at a bit width. Tables that show the same
cell share its run. yolo.py runs the methods, results_page.py writes the page.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from yolo_methods import BITS, FEW_REAL_IMAGES, IMAGES, MIXED, PARTS, REAL_IMAGES, SIZES


@dataclass(frozen=True)
class Cell:
    """One accuracy.

    Attributes:
        method: Name of a method.
        bits: One of :data:`BITS`.
        metric: Row of ``results.json``: ``'zero_shot'`` is the trained student, ``'ptq'`` the student before training,
            ``'float'`` the teacher.
    """

    method: str
    bits: str
    metric: str = 'zero_shot'


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        labels: Texts of the first columns.
        cells: Our accuracies.
        paper: The paper's accuracies, as text; empty if it has none.
    """

    labels: tuple[str, ...]
    cells: tuple[Cell, ...]
    paper: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """One table of the paper, with our numbers.

    Attributes:
        number: Number in the paper; 9 and 10 are ours.
        title: Heading.
        heads: Titles of the label columns.
        columns: Titles of our columns.
        paper: Titles of the paper's columns.
        rows: Rows from top to bottom.
        note: Explanation below the table.
        share: Whether to add a column with the share of the teacher's AP that our first column reaches.
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
        """Methods and bits of the cells from top to bottom, without duplicates."""
        return list(dict.fromkeys((cell.method, cell.bits) for row in self.rows for cell in row.cells))


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
            'LSQ and LSQ+ use the quantizer of `paper`, LSQ+ with offset activations. They are trained on real labels '
            'with the detection loss only. The paper trains them on 120000 and on 2000 real images. "Ours" in Table 2 '
            'of the paper is `paper` with labels of real images here. The number of the paper beside `paper`, '
            'zero-shot, is from its Table 5.',
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
            'PTQ is the student after initialization: from one batch of 32 images with `paper`, from four batches '
            'of 16 with `default`. It is measured in the runs of Table 2.',
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
            '"In distribution" draws the number of objects per image from the real training images. "Out of '
            'distribution" draws it uniformly from 1 to 10, for Tile from 1 to 9. Sides of boxes are uniform from '
            '0.2 to 0.8 of the image, for Tile of a cell. The paper shows false-positive sampling in figures '
            'only.\n\nWith `paper`, false-positive sampling differs from adaptive sampling in a handful of images, '
            'since both start from one object, which adaptive sampling never removes. Students of `paper` learn '
            'from labels: adaptive sampling is ahead of MultiSample and Tile at W6A6 and W5A5, and ahead of '
            'MultiSample by more than seeds differ. At W4A4 none of them learns much in this number of '
            'steps.\n\nWith `default`, students on images of any objects end within 0.7 AP of each other at W6A6 '
            'and W5A5, and within 1.4 at W4A4, where two seeds differ by 1.6. They learn from the outputs of the '
            'teacher on the images and on augmented views, so labels affect them through the images only. They '
            'need synthesized images, as the row of noise shows, but the choice of objects matters little. Our '
            'prior draws categories by the biases of the head, sizes by the anchors, and 1 to 15 objects per image.',
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
            'One stage: images and labels together at full size, with as many pixels in total as the two stages. '
            'Two: labels first, then images of these labels. Three: images of random labels, one relabeling with '
            'fixed images, then images of the corrected labels. With `paper`, whose stages are short here, one '
            'stage is ahead of two, unlike in the paper at W6A6 and W5A5: at full size the teacher finds 2.5 '
            'objects per image, at 160 px 1.2.',
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
            'All students take the same number of training steps, so fewer images mean more epochs. The numbers of the '
            'paper are for 1000 and 2000 images with labels of real images.',
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
            '`default` with detection loss is trained without augmentation, since augmentation does not adjust labels.',
        ),
        Table(
            9,
            'Ablation of `default`',
            ('part', 'change'),
            tuple(map(_shown, _PART_BITS)),
            (),
            (
                Row(('', '`default`'), tuple(Cell('default', bits) for bits in _PART_BITS)),
                *(
                    Row((part, title), tuple(Cell(method.name, bits) for bits in _PART_BITS))
                    for part, title, method in PARTS
                ),
            ),
            'Ours, not in the paper. Each row changes one setting of `default`. Rows of the part "images" have a '
            'calibration set of their own. Rows marked * were run with erasing: compare them with the row of '
            'erasing to black instead of `default`. Rows have one seed. Two seeds of `default` are 0.1 AP apart at '
            'W4A8 and 1.6 at W4A4, and two seeds of it on real images 0.6 at W4A8, so smaller differences may be '
            'chance. Two more settings gave no gain beyond the spread of the seeds and were removed: learning '
            'rates relative to the size of weights (25.9 at W4A8, 21.7 at W4A4) and activations left float at '
            'random (26.4, 21.7), against 26.4 and 20.9 of `default`.',
        ),
        Table(
            10,
            'Mixed precision: bits per layer by sensitivity',
            ('bits', 'budget: total of uniform bits'),
            ('uniform', 'by sensitivity', 'by sensitivity, 1024 images'),
            (),
            tuple(
                Row((_shown(bits), budget), (Cell('default', bits), *(Cell(method.name, bits) for method in methods)))
                for bits, budget, methods in MIXED
            ),
            'Ours, not in the paper. `tools/analysis_tools/allocate_bits.py` measured on the synthetic images of '
            'seed 0 how much the loss grows if one layer alone has few bits, and allocated bits to all layers. '
            '[yolov5-n_bits.json](../benchmarks/results/yolov5-n_bits.json) holds its commands and the bits of '
            'each layer. With weight size as the budget, only the bits of weights are allocated; with bit '
            'operations, those of weights and inputs. First and last layers have 8 bits in all rows. At W6A6 the '
            'run allocates bits itself (`zsq.quantizer.allocate`).',
        ),
    )
}
"""Tables by number; 9 and 10 are ours."""

_ALLOCATED = dict(w6a6='allocated', w5a5='mixed-operations', w4a8='mixed-size', w4a4='mixed-operations')
"""Suffix of the methods with allocated bits, by the uniform bits that define their budget."""

SUMMARY = (
    ('full precision', 'float', dict.fromkeys(BITS, 'default')),
    (f'PTQ on {IMAGES} synthetic images', 'ptq', dict.fromkeys(BITS, 'default')),
    (f'zero-shot QAT on {IMAGES} synthetic images', 'zero_shot', dict.fromkeys(BITS, 'default')),
    (
        'zero-shot QAT, bits per layer by sensitivity',
        'zero_shot',
        {bits: f'default_{name}' for bits, name in _ALLOCATED.items()},
    ),
    (f'QAT on {REAL_IMAGES} real images', 'zero_shot', dict.fromkeys(BITS, f'default_real{REAL_IMAGES}')),
)
"""Summary in README.md: the text of each row, the metric, and the method by bits."""
