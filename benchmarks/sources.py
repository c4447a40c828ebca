# SPDX-License-Identifier: Apache-2.0
"""Compare the sources of calibration images on one detector: synthesized, procedural, mixed and real images.

    python benchmarks/sources.py configs/zsq/yolov5-n_w4a8.py --name yolov5-n --seeds 0 1 2 --jobs 12

The detector may be that of another project: start the script in the folder of that project, with ``PYTHONPATH=$PWD``.
Each seed and source has a set of its own, on which a student of each bit width is trained. ``--real`` names a COCO
annotation file and its images for the comparison with real images. Jobs run in parallel, each after its set; after an
interruption, finished jobs are left out. A result is kept in ``benchmarks/results/sources`` as
``NAME_SOURCE_BITS_seedSEED.json``. ``--page`` writes the table of docs/choosing.md and measures nothing; with
``--check``, it only compares.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs import ROOT, Job, lock, run, write
from markdown_pages import markdown_table, means_with_spread, read_text, renew
from mmengine.config import Config

from mmzsq.config.presets import preset_section

PAGE = ROOT / 'docs/choosing.md'
RESULTS = ROOT / 'benchmarks/results/sources'
BEGIN, END = '<!-- sources -->', '<!-- end of sources -->'
SOURCES = {
    'procedural': 'procedural pictures',
    'synthesized': 'synthesized images',
    'mixed': 'half of each',
    'real': 'real images, for comparison',
}
BITS = ('w8a8', 'w6a6', 'w5a5', 'w4a8', 'w4a4')
DETECTORS = {
    'yolov5-n': 'YOLOv5-n on COCO',
    'yolo-fastest': 'Yolo-Fastest on COCO, from another project',
    'yolox-nano_bccd': 'YOLOX-nano on blood cells',
    'mask-rcnn_r50_bccd': 'Mask R-CNN R50 on blood cells',
    'mask-rcnn_swin-t_bccd': 'Mask R-CNN Swin-T on blood cells',
}
OTHER_RATE = (
    'Cells marked * were trained with another `zsq.train.weight_size` than the default of their bits. It changes '
    'nothing for YOLOv5-n, whose weights are small.'
)
NAME = re.compile(r'(?P<detector>.+)_(?P<source>procedural|synthesized|mixed|real)_(?P<bits>w\da\d)_seed(?P<seed>\d+)')


def main() -> None:
    """Parse the command line, and run what is missing or write the page."""
    args = _parse_args()
    if args.page:
        page = read_text(PAGE)
        renew(PAGE, page, with_table(page, read_runs(args.out)), args.check, f'{Path(__file__).name} --page')
        return
    if args.config is None or args.name is None:
        sys.exit('error: name a config, and with --name its results, or use --page')
    if 'real' in args.sources and args.real is None:
        sys.exit('error: the source real needs --real ANN_FILE IMAGE_FOLDER')
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    jobs = list(plan(args))
    with lock(args.work_dir) as held:
        failed = run(jobs, max(args.jobs, 1), args.work_dir, held.fileno(), lambda job: keep(job, args.out))
    if failed:
        sys.exit(f'error: {len(failed)} of {len(jobs)} jobs failed or could not start: {", ".join(failed)}')


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('config', nargs='?', help='config of a quantized detector; its bits are replaced')
    parser.add_argument('--name', help='name of the detector in the names of results')
    parser.add_argument('--sources', nargs='+', choices=list(SOURCES), default=['mixed', 'procedural', 'synthesized'])
    parser.add_argument('--bits', nargs='+', choices=BITS, default=list(BITS))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--images', type=int, default=512, help='images of a set (default: 512)')
    parser.add_argument('--real', nargs=2, metavar=('ANN_FILE', 'IMAGE_FOLDER'), help='real images for comparison')
    parser.add_argument('--jobs', type=int, default=1, help='parallel processes (default: 1)')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/sources'))
    parser.add_argument('--out', type=Path, default=RESULTS, help='folder of the results')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='settings of all runs, as in tools/train.py')
    parser.add_argument('--page', action='store_true', help='write the table and measure nothing')
    parser.add_argument('--check', action='store_true', help='with --page: exit with 1 if the page is not up to date')
    return parser.parse_args()


def plan(args: argparse.Namespace) -> Iterator[Job]:
    """List the jobs: the sets first, then the students, seed by seed.

    Args:
        args: The command line.
    """
    work = args.work_dir.resolve()
    config = args.config
    if args.real is not None:
        real = with_real_images(Path(args.config), args.real, work)
    for seed in args.seeds:
        for source in args.sources:
            if source != 'real':
                name = f'{args.name}_{source}_seed{seed}'
                folder = work / name
                yield Job(
                    name,
                    _command('mmzsq.generate', config, folder, _of_set(args, source, seed, folder)),
                    folder,
                    folder / 'calibration_set/manifest.json',
                )
    for seed in args.seeds:
        for source in args.sources:
            for bits in args.bits:
                name = f'{args.name}_{source}_{bits}_seed{seed}'
                folder = work / name
                options = [f'zsq.quantizer.w_bits={bits[1]}', f'zsq.quantizer.a_bits={bits[3]}']
                if source == 'real':
                    options += [f'zsq.calibration_set.seed={seed}', *args.cfg_options]
                    command = _command('mmzsq.train', str(real), folder, options)
                    yield Job(name, command, folder, folder / 'results.json')
                    continue
                made = f'{args.name}_{source}_seed{seed}'
                options += _of_set(args, source, seed, work / made)
                yield Job(
                    name, _command('mmzsq.train', config, folder, options), folder, folder / 'results.json', (made,)
                )


def _command(module: str, config: str, folder: Path, options: Sequence[str]) -> tuple[str, ...]:
    return ('-m', module, config, '--work-dir', str(folder), '--cfg-options', *options)


def _of_set(args: argparse.Namespace, source: str, seed: int, folder: Path) -> list[str]:
    values = dict(source=source, seed=seed, num_images=args.images, dir=folder / 'calibration_set')
    return [*(f'zsq.calibration_set.{key}={value}' for key, value in values.items()), *args.cfg_options]


def with_real_images(config: Path, real: Sequence[str], work: Path) -> Path:
    """Write a config that trains on real images, without their labels, and return its path.

    Args:
        config: The config of a quantized detector.
        real: Annotation file and folder of the images.
        work: Folder for the config.
    """
    annotations, images = (str(Path(path).resolve()) for path in real)
    dataset = Config.fromfile(config).val_dataloader.dataset.to_dict()
    dataset.update(data_root='', ann_file=annotations, data_prefix=dict(img=images), test_mode=False)
    path = work / f'{config.stem}_real.py'
    text = f'_base_ = [{str(config.resolve())!r}]\nzsq = dict(calibration_set=dict(real={dataset!r}))\n'
    write(text.encode(), path)
    return path


def keep(job: Job, out: Path) -> str:
    """Keep what the table shows of a finished student, and return its accuracy as a note for the progress line.

    Args:
        job: A finished job.
        out: Folder of the results.
    """
    if job.result.name != 'results.json':
        return ''
    found = json.loads(job.result.read_text())
    kept = {key: found[key] for key in ('metrics', 'evaluation_images', 'train', 'seconds', 'device', 'versions')}
    kept['health'] = (found['calibration_set'] or {}).get('health')
    settings = found['settings']['calibration_set']
    kept['images'] = found['calibration_set']['statistics']['images']
    kept['batch_size'] = found['settings']['train']['batch_size']
    kept['weight_size'] = found['settings']['train'].get('weight_size')
    kept['source'] = 'real' if settings['real'] else settings['source']
    write(json.dumps(kept, indent=1).encode() + b'\n', out / f'{job.name}.json')
    metrics: dict[str, Any] = found['metrics']
    return ': box AP ' + ', '.join(f'{row} {100 * values["coco/bbox_mAP"]:.1f}' for row, values in metrics.items())


def read_runs(folder: Path) -> dict[tuple[str, str], dict[str, list[dict[str, Any]]]]:
    """Return the results by detector and source, then by bits, with one entry a seed.

    Args:
        folder: Folder of the results.
    """
    runs: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for detector in DETECTORS:
        for source in SOURCES:
            for path in sorted(folder.glob(f'{detector}_{source}_*.json')):
                match = NAME.fullmatch(path.stem)
                assert match is not None, path
                runs.setdefault((detector, source), {}).setdefault(match['bits'], []).append(
                    json.loads(path.read_text())
                )
    return runs


def with_table(page: str, runs: Mapping[tuple[str, str], Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """Return a page with the tables of results between its two markers.

    Args:
        page: Content of docs/choosing.md.
        runs: Results, see :func:`read_runs`.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f'error: {PAGE.name} must hold the lines {BEGIN} and {END}')
    parts = []
    for detector, title in DETECTORS.items():
        found = {source: by_bits for (name, source), by_bits in runs.items() if name == detector}
        if found:
            parts.append(_table(title, found))
    return f'{before}{begin}\n\n' + '\n\n'.join(parts) + f'\n\n{end}{after}'


def _table(title: str, found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> str:
    """The table of one detector: a row for each source, trained and after post-training quantization alone."""
    some = next(iter(next(iter(found.values())).values()))[0]
    header = ('images', *(bits.upper() for bits in BITS), 'seeds', 'training, s')
    rows = []
    for row, suffix in (('ptq', ', PTQ'), ('zero_shot', ', QAT')):
        for source, by_bits in found.items():
            students = [student for of_bits in by_bits.values() for student in of_bits]
            seconds = statistics.median(student['seconds']['train'] for student in students)
            rows.append(
                (
                    f'{students[0]["images"]} {SOURCES[source]}{suffix}',
                    *(_cell(by_bits.get(bits, ()), row, bits) for bits in BITS),
                    str(max(map(len, by_bits.values()))),
                    f'{seconds:.0f}' if row == 'zero_shot' else '',
                )
            )
    teacher = 100 * some['metrics']['float']['coco/bbox_mAP']
    caption = (
        f'**{title}**, full precision {teacher:.1f} AP, {some["evaluation_images"]} images, '
        f'{some["train"]["iterations"]} steps of {some["batch_size"]}, {some["device"]}'
    )
    table = f'{caption}:\n\n{markdown_table(header, rows)}'
    return f'{table}\n\n{OTHER_RATE}' if any('*' in cell for row in rows for cell in row) else table


def _cell(students: Sequence[Mapping[str, Any]], row: str, bits: str) -> str:
    """The mean and spread of the students of a cell, marked if they were trained with another rule of the rate."""
    measured = [[student['metrics'][row]['coco/bbox_mAP']] for student in students if row in student['metrics']]
    if not measured:
        return ''
    today = preset_section('default', dict(quantizer=dict(w_bits=int(bits[1]), a_bits=int(bits[3]))))
    other = any(student.get('weight_size') != today['train']['weight_size'] for student in students)
    return means_with_spread(measured) + ' *' * (other and row == 'zero_shot')


if __name__ == '__main__':
    main()
