# SPDX-License-Identifier: Apache-2.0
"""The figures of a report, drawn by matplotlib as SVG for the page, and as SVG and PNG files beside it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from mmzsq.report.runs import Group, Run

INK = '#1b2027'
"""Color of text and axes. In the page it follows the theme."""

FLOAT, PTQ, STUDENT = '#8a94a3', '#e09f3e', '#2f81f7'
LOST, GAINED = '#e5484d', '#30a46c'
ROW_COLORS = dict(float=FLOAT, ptq=PTQ, zero_shot=STUDENT)
CYCLE = (STUDENT, PTQ, GAINED, LOST, '#8e4ec6', '#00a2c7', FLOAT)
PIXELS_PER_INCH = 118
WORST_CLASSES = 10
LISTED_CLASSES = 24

STYLE: Any = {
    'font.family': 'sans-serif',
    'font.sans-serif': ['DejaVu Sans'],
    'font.size': 9,
    'svg.fonttype': 'none',
    'text.color': INK,
    'axes.edgecolor': INK,
    'axes.labelcolor': INK,
    'axes.linewidth': 0.6,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'axes.titlesize': 10,
    'axes.titleweight': 'bold',
    'axes.titlelocation': 'left',
    'grid.color': INK,
    'grid.alpha': 0.12,
    'grid.linewidth': 0.6,
    'xtick.color': INK,
    'ytick.color': INK,
    'legend.frameon': False,
    'lines.linewidth': 1.6,
    'axes.prop_cycle': cycler(color=CYCLE),
}


class Drawing:
    """A figure that is drawn.

    Args:
        name: Name of its files.
        caption: What it shows, in one or two sentences.
        figure: The figure.
    """

    def __init__(self, name: str, caption: str, figure: Figure) -> None:
        self.name = name
        self.caption = caption
        self.figure = figure
        self._svg: bytes | None = None

    def svg(self) -> bytes:
        """Return the SVG."""
        if self._svg is not None:
            return self._svg
        with matplotlib.rc_context({**STYLE, 'svg.hashsalt': self.name}):
            FigureCanvasSVG(self.figure)
            buffer = io.BytesIO()
            metadata = dict.fromkeys(('Date', 'Creator', 'Format', 'Type'))
            self.figure.savefig(buffer, format='svg', transparent=True, metadata=metadata)
        # The layout takes long, and is the same in all formats.
        self.figure.set_layout_engine('none')
        self._svg = buffer.getvalue()
        return self._svg

    def png(self) -> bytes:
        """Return the PNG on white."""
        with matplotlib.rc_context(STYLE):
            FigureCanvasAgg(self.figure)
            buffer = io.BytesIO()
            self.figure.savefig(buffer, format='png', dpi=140, facecolor='white')
        return buffer.getvalue()

    def inline(self) -> str:
        """Return the SVG for a page: its text and axes have the color of the text around it."""
        text = self.svg().decode()
        text = text[text.index('<svg') :].replace(INK, 'currentColor')
        # Text keeps its size: a chart in a wide place stays as it is.
        width = round(self.figure.get_figwidth() * PIXELS_PER_INCH)
        label = self.name.replace('_', ' ')
        return text.replace('<svg ', f'<svg role="img" aria-label="{label}" style="max-width:{width}px" ', 1)


def draw_all(run: Run) -> dict[str, Drawing]:
    """Draw all figures that a run has the data for, by their names."""
    makers: dict[str, Callable[[Run], Drawing | None]] = dict(
        classes=_classes, sizes=_sizes, scores=_scores, thresholds=_thresholds, labels=_labels,
        box_sizes=_box_sizes, synthesis=_synthesis, training=_training, seconds=_seconds, layers=_layers,
    )  # fmt: skip
    with matplotlib.rc_context(STYLE):
        drawings = {name: maker(run) for name, maker in makers.items()}
    return {name: drawing for name, drawing in drawings.items() if drawing is not None}


@contextmanager
def _axes(width: float, height: float, columns: int = 1, **options: Any) -> Iterator[tuple[Figure, list[Axes]]]:
    figure = Figure(figsize=(width, height), layout='constrained')
    yield figure, list(np.atleast_1d(figure.subplots(1, columns, **options)).flat)


def compare(groups: Sequence[Group], names: Sequence[str], metric: str) -> Drawing:
    """Draw a metric of several groups of runs as bars.

    Args:
        groups: The runs.
        names: Name of each group.
        metric: Name of the metric.
    """
    with matplotlib.rc_context(STYLE), _axes(7, 0.9 + 0.75 * len(groups)) as (figure, (axis,)):
        rows = ('float', 'ptq', 'zero_shot')
        for offset, row in enumerate(rows):
            spreads = [group.spread(row, metric) for group in groups]
            places = [index + (offset - 1) * 0.27 for index, spread in enumerate(spreads) if spread]
            known = [spread for spread in spreads if spread]
            errors = [spread[1] or 0.0 for spread in known]
            label = dict(float='full precision', ptq='PTQ', zero_shot='student')[row]
            axis.barh(places, [s[0] for s in known], 0.25, xerr=errors, color=ROW_COLORS[row], label=label, ecolor=INK)
        axis.set_yticks(range(len(groups)), names)
        axis.invert_yaxis()
        axis.grid(axis='y', visible=False)
        axis.set_xlabel(metric)
        figure.legend(loc='outside upper center', ncols=3)
    return Drawing('comparison', f'{metric} of each group of runs. Whiskers are standard deviations.', figure)


def _classes(run: Run) -> Drawing | None:
    by_row: Mapping[str, Mapping[str, float]] = run.class_ap
    before, after = by_row.get('float', {}), by_row.get(run.last_row, {})
    names = sorted((name for name in before if name in after), key=lambda name: after[name] - before[name])
    if not names:
        return None
    total, names = len(names), names[:WORST_CLASSES]
    with _axes(3.8, 1.0 + 0.27 * max(len(names), 5)) as (figure, (axis,)):
        places = range(len(names))
        axis.hlines(places, [after[n] for n in names], [before[n] for n in names], color=LOST, alpha=0.45, lw=3)
        axis.plot([before[n] for n in names], places, 'o', color=FLOAT, label='full precision')
        ptq = by_row.get('ptq', {})
        if run.last_row != 'ptq' and all(name in ptq for name in names):
            axis.plot([ptq[n] for n in names], places, '|', color=PTQ, label='PTQ', ms=9, mew=2)
        axis.plot([after[n] for n in names], places, 'o', color=STUDENT, label='quantized')
        axis.set_yticks(places, names)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.set_xlabel('AP')
        figure.legend(loc='outside upper center', ncols=3)
    which = f'The {len(names)} classes of {total} that lost most' if total > len(names) else 'All classes'
    return Drawing('ap_by_class', f'AP by class. {which}, from the largest loss on.', figure)


def _sizes(run: Run) -> Drawing | None:
    metrics = run.results['metrics']
    ends = dict(s='small', m='medium', l='large')
    base = run.metric or ''
    names = [f'{base}_{end}' for end in ends if any(row.get(f'{base}_{end}', -1) >= 0 for row in metrics.values())]
    if not names:
        return None
    with _axes(3.6, 2.8) as (figure, (axis,)):
        for offset, (row, values) in enumerate(metrics.items()):
            places = [index + (offset - (len(metrics) - 1) / 2) * 0.26 for index in range(len(names))]
            title = dict(float='full precision', ptq='PTQ', zero_shot='student').get(row, row)
            axis.bar(places, [max(values.get(n, 0), 0) for n in names], 0.24, color=ROW_COLORS.get(row), label=title)
        axis.set_xticks(range(len(names)), [ends[name[-1]] for name in names])
        axis.grid(axis='x', visible=False)
        axis.set_ylabel('AP')
        figure.legend(loc='outside upper center', ncols=3, handlelength=1, columnspacing=1)
    return Drawing('ap_by_size', "AP by size of the objects: COCO's limits are 32 and 96 pixels.", figure)


def _scores(run: Run) -> Drawing | None:
    pairs = np.array(run.details.get('detections', {}).get('pairs', []), float).reshape(-1, 2)
    if len(pairs) < 2:
        return None
    with _axes(3.6, 3.4) as (figure, (axis,)):
        axis.plot([0, 1], [0, 1], color=INK, lw=0.8, ls='--')
        axis.scatter(pairs[:, 0], pairs[:, 1], s=10, color=STUDENT, alpha=0.5, lw=0)
        axis.set(xlim=(0, 1), ylim=(0, 1), xlabel='score of the full-precision detector', ylabel='quantized')
        axis.set_aspect('equal')
    return Drawing('scores', f'Scores of the same objects, {len(pairs)} pairs.', figure)


def thresholds(run: Run) -> list[tuple[float, float, int]]:
    """Return, for thresholds of the float detector, the one of the student with as many detections, and their number.

    Args:
        run: A run with details.
    """
    scores = run.details.get('detections', {}).get('scores', {})
    before, after = (sorted(scores.get(name, []), reverse=True) for name in ('float', 'quantized'))
    rows = []
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        count = sum(score >= threshold for score in before)
        if 0 < count <= len(after):
            rows.append((threshold, after[count - 1], count))
    return rows


def _thresholds(run: Run) -> Drawing | None:
    scores = run.details.get('detections', {}).get('scores', {})
    if not scores.get('float') or not scores.get('quantized'):
        return None
    with _axes(3.6, 3.4) as (figure, (axis,)):
        for name, title, color in (('float', 'full precision', FLOAT), ('quantized', 'quantized', STUDENT)):
            values = np.sort(scores[name])
            axis.step(values, np.arange(len(values), 0, -1), color=color, label=title)
        axis.set(xlabel='score threshold', ylabel='detections above it', yscale='log', xlim=(0, 1))
        axis.legend()
    return Drawing('thresholds', 'Detections that are left above each score threshold.', figure)


def _labels(run: Run) -> Drawing | None:
    if not run.labels.get('counts') or not sum(run.labels['counts']):
        return None
    real = run.details.get('real_labels') or {}
    order = sorted(range(len(run.classes)), key=lambda index: -run.labels['counts'][index])[:LISTED_CLASSES]
    shares = [('calibration set', run.labels['counts'], STUDENT)]
    if len(real.get('counts', [])) == len(run.classes) and sum(real['counts']):
        shares.append(('evaluation data', real['counts'], FLOAT))
    with _axes(4.4, 2.9) as (figure, (axis,)):
        width = 0.8 / len(shares)
        for place, (title, counts, color) in enumerate(shares):
            values = np.array(counts)[order] / sum(counts) * 100
            axis.bar(np.arange(len(order)) + (place - (len(shares) - 1) / 2) * width, values, width * 0.92,
                     color=color, label=title)  # fmt: skip
        axis.set_xticks(range(len(order)), [run.classes[index] for index in order], rotation=40, ha='right')
        axis.grid(axis='x', visible=False)
        axis.set_ylabel('share of labels in %')
        axis.legend()
    more = f' The {len(order)} most frequent of {len(run.classes)} classes.' if len(order) < len(run.classes) else ''
    return Drawing('labels', f'Labels of the calibration set by class.{more}', figure)


def _box_sizes(run: Run) -> Drawing | None:
    if not run.labels.get('sizes'):
        return None
    real = (run.details.get('real_labels') or {}).get('sizes')
    bins = [float(edge) for edge in np.linspace(0, 1, 26)]
    with _axes(4.4, 2.9) as (figure, (axis,)):
        for title, sizes, color in (
            ('calibration set', run.labels['sizes'], STUDENT),
            ('evaluation data', real, FLOAT),
        ):
            if sizes:
                weights = np.full(len(sizes), 100 / len(sizes))
                axis.hist(sizes, bins, weights=weights, histtype='stepfilled', color=color, alpha=0.3)
                axis.hist(sizes, bins, weights=weights, histtype='step', color=color, label=title, lw=1.6)
        axis.set(xlabel='size of the box relative to the image', ylabel='share of boxes in %', xlim=(0, 1))
        axis.legend()
    return Drawing('box_sizes', 'Root of the share of the image that a box covers.', figure)


def _synthesis(run: Run) -> Drawing | None:
    stages = run.stages()
    if not stages:
        return None
    with _axes(max(3.7 * len(stages), 5.2), 2.9, len(stages)) as (figure, axes):
        for axis, (name, curves) in zip(axes, stages.items(), strict=True):
            for loss, values in curves.items():
                if loss != 'iteration' and any(value > 0 for value in values):
                    axis.plot(curves['iteration'], values, label=loss)
            axis.set(title=name, xlabel='iteration', yscale='log')
        axes[0].set_ylabel('weighted loss')
        handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc='outside upper center', ncols=3)
    return Drawing('synthesis_losses', 'Losses of the images, stage by stage, averaged over the batches.', figure)


def _training(run: Run) -> Drawing | None:
    losses = run.details.get('losses') or {}
    if not losses:
        return None
    with _axes(5.2, 2.9) as (figure, (axis,)):
        for name, curve in losses.items():
            total = name == 'loss'
            if total and len(losses) == 2:
                continue
            axis.plot(curve['iterations'], curve['values'], color=INK if total else None, lw=1 if total else 1.6,
                      ls=':' if total else '-', label='sum' if total else _loss_title(name))  # fmt: skip
        axis.set(xlabel='iteration', ylabel='weighted loss', yscale='log')
        axis.legend()
    return Drawing('training_losses', 'Losses of the training.', figure)


def _loss_title(name: str) -> str:
    return name.split('_', 2)[-1] if name.startswith('loss_') and name[5:6].isdigit() else name.removeprefix('loss_')


def stage_seconds(run: Run) -> dict[str, float]:
    """Return the seconds of all steps of a run, in order."""
    stages = (run.results.get('calibration_set') or {}).get('stages') or {}
    seconds = {f'synthesis, {name}': float(stage['seconds']) for name, stage in stages.items()}
    titles = dict(
        train='training', evaluate_float='evaluation, float', evaluate_ptq='evaluation, PTQ',
        evaluate_zero_shot='evaluation, student',
    )  # fmt: skip
    for name, value in run.results['seconds'].items():
        seconds[titles.get(name, name)] = float(value)
    return seconds


def _seconds(run: Run) -> Drawing | None:
    seconds = stage_seconds(run)
    if not seconds:
        return None
    with _axes(5.2, 0.7 + 0.3 * len(seconds)) as (figure, (axis,)):
        bars = axis.barh(list(seconds), list(seconds.values()), color=STUDENT, height=0.6)
        axis.bar_label(bars, [f' {value:,.1f} s' for value in seconds.values()], fontsize=8)
        axis.invert_yaxis()
        axis.grid(axis='y', visible=False)
        axis.set_xlabel('seconds')
        axis.margins(x=0.15)
    return Drawing('seconds', 'Time of each step, added over the batches.', figure)


def _layers(run: Run) -> Drawing | None:
    layers = [layer for layer in run.layers if 'weight' in layer and 'input' in layer]
    if not layers:
        return None
    with _axes(9.4, 2.7) as (figure, (axis,)):
        places = np.arange(len(layers))
        for offset, key, color in ((-0.2, 'input', PTQ), (0.2, 'weight', STUDENT)):
            axis.bar(places + offset, [100 * layer[key]['error'] for layer in layers], 0.4, color=color, label=key)
        axis.set(xlim=(-0.8, len(layers) - 0.2), xlabel='quantized layers from input to output', ylabel='error in %')
        axis.grid(axis='x', visible=False)
        figure.legend(loc='outside upper left', ncols=2)
    caption = 'Rounding error of weights and inputs, relative to their root mean square.'
    return Drawing('layers', caption, figure)
