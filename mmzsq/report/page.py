# SPDX-License-Identifier: Apache-2.0
"""The page: all data of a report as one HTML file."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from mmzsq.atomic_files import make_directory, write_atomically
from mmzsq.report import figures
from mmzsq.report.runs import FOLDER, ROWS, Group, Run, differences, flatten, group_runs
from mmzsq.synthesis.coco_format import annotation_boxes, parse_coco

REPORT_FILE = 'report.html'
COMPARISON_FILE = 'comparison.html'
MAX_BYTES = 3_000_000
GALLERY_IMAGES = 24
GALLERY_SIDE = 288
MAIN_METRICS = ('mAP', 'mAP_50', 'mAP_75', 'mAP_s', 'mAP_m', 'mAP_l', 'AP50')
NO_METRICS = 'Accuracy was not measured'


def write_report(work_dirs: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write the page of one run, or of several, and its figures as SVG and PNG files.

    Args:
        work_dirs: Folders of finished runs, at least one.
        out: The page. By default ``report.html`` in the work_dir of a single run, whose figures go to
            ``report/figures``, or ``comparison.html`` in the current folder.

    Returns:
        Path of the page.

    Raises:
        UserError: If a folder has no results, or a file cannot be written.
    """
    runs = [Run.load(work_dir) for work_dir in work_dirs]
    groups = group_runs(runs)
    single = len(runs) == 1
    path = Path(out) if out is not None else runs[0].path / REPORT_FILE if single else Path(COMPARISON_FILE)
    drawings = figures.draw_all(runs[0])
    metric = runs[0].metric
    if not single and metric is not None:
        drawings['comparison'] = figures.compare(groups, [group_name(group) for group in groups], metric)
    folder = path.parent / FOLDER / 'figures' if single else path.parent / f'{path.stem}_figures'
    make_directory(folder)
    for drawing in drawings.values():
        write_atomically(folder / f'{drawing.name}.svg', drawing.svg())
        write_atomically(folder / f'{drawing.name}.png', drawing.png())
    for images in (GALLERY_IMAGES, GALLERY_IMAGES // 2, 0):
        page = render(runs, groups, drawings, images)
        if len(page) < MAX_BYTES:
            break
    write_atomically(path, page)
    return path


def render(
    runs: Sequence[Run], groups: Sequence[Group], drawings: dict[str, figures.Drawing], gallery_images: int
) -> bytes:
    """Return the page.

    Args:
        runs: The runs. Details are those of the first one.
        groups: The same runs, see :func:`~mmzsq.report.runs.group_runs`.
        drawings: Figures by name.
        gallery_images: Number of images of the calibration set at most.
    """
    environment = Environment(
        loader=PackageLoader('mmzsq.report'), autoescape=select_autoescape(['html']), trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    loader: Any = environment.loader
    run = runs[0]
    detections = run.details.get('detections') or {}
    data: dict[str, Any] = dict(
        classes=run.classes,
        layers=run.layers,
        paste=paste_header(run),
        images=[_compared(run, row) for row in detections.get('images', [])],
        gallery=gallery(run, gallery_images),
        forming=[dict(stage=stage, iteration=step, src=jpeg_uri(file)) for stage, step, file in run.forming()],
    )
    context = dict(
        run=run,
        runs=runs,
        groups=[(group_name(group), group) for group in groups],
        single=len(runs) == 1,
        verdict=best_verdict(groups),
        title=f'{config_name(run)} at {run.bits}' if len(groups) == 1 else f'{len(runs)} runs',
        metrics=main_metrics(run),
        rows=[row for row in ROWS if row != 'zero_shot' or run.last_row == 'zero_shot'],
        row_titles=ROWS,
        figures={name: Markup(drawing.inline()) for name, drawing in drawings.items()},
        captions={name: drawing.caption for name, drawing in drawings.items()},
        thresholds=figures.thresholds(run),
        scores=run.results.get('scores'),
        source=detections.get('source'),
        compared=detections.get('compared'),
        health=(run.results.get('calibration_set') or {}).get('health'),
        provenance=provenance(run),
        settings=flatten(dict(quantizer=run.results['quantizer'], **run.results['settings'])),
        differences=differences(runs),
        # Text from files must not end the script element.
        data=Markup(json.dumps(data, separators=(',', ':')).replace('<', '\\u003c')),
        has=dict(layers=bool(data['layers']), images=bool(data['images']), gallery=bool(data['gallery']),
                 forming=bool(data['forming']), sensitivity=any('sensitivity' in layer for layer in data['layers'])),
        style=Markup(loader.get_source(environment, 'report.css')[0]),
        script=Markup(loader.get_source(environment, 'report.js')[0]),
    )  # fmt: skip
    return environment.get_template('report.html').render(context).encode()


def config_name(run: Run) -> str:
    """Return the name of the config of a run without folder and ending."""
    return Path(run.results.get('config') or run.name).stem


def group_name(group: Group) -> str:
    """Return a title of a group: that of its only run, or the config and the number of seeds."""
    first = group.runs[0]
    return first.name if len(group.runs) == 1 else f'{config_name(first)} ({len(group.runs)} seeds)'


def main_metrics(run: Run) -> list[str]:
    """Return the names of the metrics of the table, without those of single classes."""
    names = dict.fromkeys(name for row in run.results['metrics'].values() for name in row)
    kept = [name for name in names if name.endswith(MAIN_METRICS)]
    return kept or [name for name in names if not name.endswith('_precision')][:6]


def verdict(run: Run, group: Group) -> str:
    """Return one sentence about accuracy, size and data.

    Args:
        run: The run.
        group: Runs with other seeds; accuracy is their mean.
    """
    before, after = (group.spread(row, run.metric) for row in ('float', run.last_row))
    size = f'1/{run.shrunk:.1f} of the size'
    if before is None or after is None or not before[0]:
        text = f'{run.bits} has {size}; its accuracy was not measured'
    else:
        text = f'{run.bits} keeps {after[0] / before[0]:.0%} of the accuracy at {size}'
    if run.speed is not None:
        text = f'{text}; {speed_phrase(run.speed)}'
    if run.trained_on_real:
        return f'{text}; this run learned from real images, as a comparison.'
    return f'{text}; no image of yours was read to quantize it.'


def speed_phrase(speed: Mapping[str, Any]) -> str:
    """Return a measured speed in a few words.

    Args:
        speed: See :class:`mmzsq.deploy.latency.Speed`.
    """
    ratio = speed['ratio']
    runtime = dict(openvino='OpenVINO', onnxruntime='ONNX Runtime')[speed['runtime']]
    if 0.95 < ratio < 1.05:
        return f'as fast as float on this CPU in {runtime}'
    return (
        f'{ratio:.1f}x faster on this CPU in {runtime}'
        if ratio > 1
        else (f'{1 / ratio:.1f}x slower on this CPU in {runtime}')
    )


def paste_header(run: Run) -> list[str]:
    """Return the first and the last lines of a config that inherits from that of a run and keeps layers at 8 bits.

    The lines of the layers go between them, such as ``'backbone.conv1': 8,``.
    """
    config = Path(run.results.get('config') or 'config.py')
    try:
        pure_python = 'read_base()' in config.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError):
        pure_python = False
    if pure_python:
        base = f'from mmengine.config import read_base\n\nwith read_base():\n    from .{config.stem} import *\n\n'
        return [f'{base}zsq.merge(dict(quantizer=dict(overrides={{', '})))']
    return [f'_base_ = {[f"./{config.name}"]!r}\nzsq = dict(quantizer=dict(overrides={{', '}))']


def best_verdict(groups: Sequence[Group]) -> str:
    """Return the verdict of the only group, or of the one with the best accuracy, by its name."""
    if len(groups) == 1:
        return verdict(groups[0].runs[0], groups[0])

    def accuracy(group: Group) -> float:
        spread = group.spread(group.runs[0].last_row, groups[0].runs[0].metric)
        return -1.0 if spread is None else spread[0]

    best = max(groups, key=accuracy)
    return f'Best of {len(groups)}, {group_name(best)}: {verdict(best.runs[0], best)}'


def gallery(run: Run, count: int) -> list[dict[str, Any]]:
    """Return images of the calibration set, evenly spaced, with their boxes.

    Args:
        run: The run.
        count: Number of images at most.
    """
    if run.set_dir is None or not run.labels or not count:
        return []
    coco = parse_coco((run.set_dir / 'annotations' / 'instances.json').read_bytes())
    category = {key: index for index, key in enumerate(coco.cats)}
    records = list(coco.imgs.values())
    count = min(count, len(records))
    images = []
    for record in (records[index * len(records) // count] for index in range(count)):
        pixels = cv2.imread(str(run.set_dir / 'images' / record['file_name']))
        if pixels is None:
            continue
        scale = min(GALLERY_SIDE / max(pixels.shape[:2]), 1)
        if scale < 1:
            pixels = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        content = cv2.imencode('.jpg', pixels, [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()
        annotations = coco.imgToAnns[record['id']]
        boxes = [
            [*(round(value, 1) for value in bbox), category[annotation['category_id']]]
            for annotation, bbox in zip(annotations, annotation_boxes(annotations).tolist(), strict=True)
        ]
        images.append(
            dict(src=data_uri(content), width=record['width'], height=record['height'], boxes=boxes,
                 name=record['file_name'])
        )  # fmt: skip
    return images


def _compared(run: Run, row: dict[str, Any]) -> dict[str, Any]:
    return dict(row, src=jpeg_uri(run.path / FOLDER / row['file']))


def jpeg_uri(path: Path) -> str:
    """Return a JPEG file as a ``data:`` address; empty if it is missing."""
    return data_uri(path.read_bytes()) if path.is_file() else ''


def data_uri(content: bytes) -> str:
    """Return the bytes of a JPEG as a ``data:`` address."""
    return f'data:image/jpeg;base64,{base64.b64encode(content).decode()}'


def provenance(run: Run) -> dict[str, str]:
    """Return what is needed to repeat a run, by title."""
    results = run.results
    rows = {
        'command': run.details.get('command'),
        'config': results.get('config'),
        'preset': results.get('preset'),
        'teacher': results.get('teacher'),
        'SHA-256 of the teacher': results.get('teacher_sha256'),
        'checkpoint': results.get('checkpoint'),
        'device': results.get('device'),
        'images of the evaluation': results.get('evaluation_images'),
        'speed': run.speed
        and f'{run.speed["file"]}, {run.speed["pairs"]} alternating pairs with float, '
        f'{run.speed["size"][0]}x{run.speed["size"][1]} pixels, {run.speed["threads"]} threads, {run.speed["cpu"]}',
        **results['versions'],
    }
    return {name: str(value) for name, value in rows.items() if value not in (None, '')}
