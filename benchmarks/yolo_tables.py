# SPDX-License-Identifier: Apache-2.0
"""What docs/results.md reports of YOLOv5-n: the paper's Tables 2 and 4 to 8, and two of ours.

All of it is data. A cell of a table is one accuracy of a method of yolo_methods.py at a bit width; two tables with the
same cell share the run. yolo.py runs them, results_page.py writes the page.
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
            'PTQ is the student as it is initialized, from one batch of 32 images with `paper` and four of 16 with '
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
            'In distribution, the numbers of objects an image are drawn from those of the real training images; out '
            'of it, they are even from 1 to 10, of Tile from 1 to 9. Sides of boxes are even from 0.2 to 0.8 of the '
            'image, of Tile from 0.2 to 0.8 of a cell. The paper shows false-positive sampling in figures alone. With'
            ' `paper` it differs from adaptive sampling in a handful of images, since both start from one object, '
            'which adaptive sampling never removes. There students learn the labels: adaptive ones are ahead of '
            'MultiSample and Tile at W6A6 and W5A5, of MultiSample by more than seeds differ; at W4A4 none of them '
            'gets anywhere in so few steps. With `default`, students of any objects end within 0.7 AP of one another '
            'at W6A6 and W5A5, and within 1.4 at W4A4, where two seeds differ by 1.6: they learn what the teacher '
            'says of the images and of other views of them, and a label reaches them through its image alone. They '
            'need synthesized images, as the row of noise shows; which objects are in them matters little. The prior '
            'that ours starts from is categories by the biases of the head, sizes by the anchors, and 1 to 15 objects'
            ' an image.',
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
            'One: images and labels together, at full size, as many pixels as the stages of two. Two: labels first, '
            'then images of them. Three: images of random labels, one correction with the images fixed, then images '
            'of what became of the labels. With `paper`, where stages are short, one is ahead of two, against the '
            "paper's order at W6A6 and W5A5: at full size the teacher comes to see more objects than at 160 px, 2.5 "
            'an image and not 1.2.',
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
                    for part, title, method in PARTS
                ),
            ),
            'Ours, not in the paper. One thing is otherwise in each row, and all else as in `default`. Rows of the '
            'part "images" have a calibration set of their own. Those marked *, of whatever part, were run with '
            'erasing: they are to be compared with the row of erasing to black, not with `default`. Rows have one '
            'seed; two of `default` are 0.1 AP apart at W4A8 and 1.6 at W4A4, but two of it on real images 0.6 at '
            'W4A8: smaller differences may be chance. Two more settings gave no gain beyond the spread of the '
            'seeds and were removed: learning rates relative to the size of weights (25.9 at W4A8, 21.7 at W4A4) and '
            'activations left float at random (26.4, 21.7), against 26.4 and 20.9 of `default`.',
        ),
        Table(
            10,
            'Bits of each layer by its sensitivity',
            ('bits', 'no larger than with these bits in every layer'),
            ('the same in every layer', 'by sensitivity', 'by sensitivity, 1024 images'),
            (),
            tuple(
                Row((_shown(bits), budget), (Cell('default', bits), *(Cell(method.name, bits) for method in methods)))
                for bits, budget, methods in MIXED
            ),
            'Ours, not in the paper. `tools/analysis_tools/allocate_bits.py` measured on the synthetic images of seed 0'
            ' how much the loss grows with few bits in one layer alone, and wrote the configs with the bits of each '
            'layer; their first lines are its commands. Bits of weights alone are chosen where their size is the '
            'budget, of weights and inputs where bit operations are. First and last layers have 8 bits in all. At W6A6 '
            'the run does it by itself, `zsq.quantizer.allocate`.',
        ),
    )
}
"""By the paper's number; 9 and 10 are ours."""

_ALLOCATED = dict(w6a6='allocated', w5a5='mixed-operations', w4a8='mixed-size', w4a4='mixed-operations')
"""End of the names of the methods whose layers have bits of their own, by the bits that are their budget."""

SUMMARY = (
    ("zero-shot, the paper's recipe cut short", dict.fromkeys(BITS, 'paper')),
    (
        f'LSQ on {REAL_IMAGES} real images and their labels, as short',
        dict.fromkeys(BITS, f'paper_lsq-real{REAL_IMAGES}'),
    ),
    (f'our recipe on {REAL_IMAGES} real images', dict.fromkeys(BITS, f'default_real{REAL_IMAGES}')),
    *(
        row
        for images, method in ((IMAGES, 'default'), (1024, 'default_1024'))
        for row in (
            (f'zero-shot, {images} images', dict.fromkeys(BITS, method)),
            (
                f'zero-shot, {images} images, bits of each layer by its sensitivity',
                {bits: f'{method}_{name}' for bits, name in _ALLOCATED.items()},
            ),
        )
    ),
)
"""What README.md shows: the text of each row, and its method by bits."""
