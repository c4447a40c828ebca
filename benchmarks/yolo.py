# SPDX-License-Identifier: Apache-2.0
"""Repeat the paper's tables on YOLOv5-n, as docs/results.md reports them, as much of it at once as the GPUs allow.

    python benchmarks/yolo.py --tables 2 5 --jobs 4 --seeds 0 1
    python benchmarks/yolo.py --tables 2 --list

What is run for which table stands in yolo_methods.py and yolo_tables.py. ``data/coco`` holds the images, laid out as
COCO, and ``--weights`` names a YOLOv5-n v6.0 checkpoint. Calibration sets come first, then students; the two never
share a GPU. Runs with a file in ``benchmarks/results/yolov5-n`` are not repeated; delete the file to repeat one.
Killed and started again, the tool goes on with what is not finished. Logs are in ``work_dirs/yolov5-n/logs``, galleries
go to ``docs/images/yolov5-n``. ``python benchmarks/results_page.py`` then writes the page.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import ROOT, Job, keep_results, lock, run, tool, write, write_gallery
from yolo_methods import (
    BITS,
    METHODS,
    PRESETS,
    Images,
    Method,
    Options,
    layer_overrides,
    set_options,
    student_options,
)
from yolo_tables import TABLES

WORK = Path('work_dirs/yolov5-n')
RESULTS = Path('benchmarks/results/yolov5-n')
TEACHER = Path('checkpoints/yolov5n.safetensors')
CONVERT = 'teacher'
SET, STUDENT = 'set', 'student'
"""Kinds of jobs: students wait for the host between kernels, and sets would keep the GPU from them."""
GALLERY_SEED = 0


@dataclass(frozen=True)
class Run:
    """One student.

    Attributes:
        method: Key of ``METHODS``.
        bits: Of weights and activations, as ``'w4a8'``.
        seed: Of its calibration set and its training.
        tables: Numbers of the tables that show it.
    """

    method: str
    bits: str
    seed: int
    tables: tuple[int, ...]

    @property
    def name(self) -> str:
        """That of its folder and of its file in ``benchmarks/results/yolov5-n``."""
        return f'{self.method}_{self.bits}_seed{self.seed}'

    @property
    def images(self) -> Images | None:
        """Its calibration set; None if it learns from real images."""
        return METHODS[self.method].images


def main() -> None:
    """Parse the command line; list, or run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument(
        '--tables',
        type=int,
        nargs='+',
        choices=list(TABLES),
        default=list(TABLES),
        help="the paper's numbers, the most urgent first (default: all)",
    )
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='of sets and students (default: 0)')
    parser.add_argument('--bits', nargs='+', choices=BITS, default=list(BITS))
    parser.add_argument('--presets', nargs='+', choices=PRESETS, default=list(PRESETS))
    parser.add_argument('--methods', nargs='+', choices=list(METHODS), metavar='METHOD', help='these alone')
    parser.add_argument('--jobs', type=int, default=4, help='processes at once, on all GPUs together (default: 4)')
    parser.add_argument('--gpus', type=int, default=1, help='GPUs that they are spread over (default: 1)')
    parser.add_argument('--list', action='store_true', help='start nothing; name each run, its tables and its commands')
    parser.add_argument(
        '--weights',
        type=Path,
        default=Path('checkpoints/yolov5n.pt'),
        help=f'the teacher as it is published, read where {TEACHER} is missing (default: checkpoints/yolov5n.pt)',
    )
    parser.add_argument(
        '--out', type=Path, default=ROOT, help='folder for benchmarks/results/ and docs/ (default: this repository)'
    )
    parser.add_argument('--work-dir', type=Path, default=WORK, help=f'folder of sets and students (default: {WORK})')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        help='settings of all sets and students, as of tools/train.py, for a trial: with an --out and a --work-dir of '
        'its own',
    )
    args = parser.parse_args()
    out = args.out.resolve()
    weights = args.weights.resolve()
    if args.cfg_options and (out == ROOT or args.work_dir == WORK):
        parser.error('--cfg-options makes other runs than those of the tables: give --out and --work-dir, too')
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    runs = list(runs_of(args.tables, args.seeds, args.bits, args.presets, args.methods))
    kept = {path.stem for path in RESULTS.glob('*.json')} if not args.cfg_options else set()
    write_configs(runs, args.work_dir)
    if args.list:
        sys.stdout.write(listing(runs, kept, args.work_dir, args.cfg_options))
        return
    missing = [student for student in runs if student.name not in kept]
    sys.stdout.write(f'{len(runs) - len(missing)} of {len(runs)} runs are kept in {RESULTS}\n')
    jobs = list(plan(missing, weights, args.work_dir, args.cfg_options))
    with lock(args.work_dir) as held:
        failed = run(
            jobs, max(args.jobs, 1), args.work_dir, held.fileno(), lambda job: keep(job, out), max(args.gpus, 1)
        )
    if failed:
        sys.exit(f'error: {len(failed)} of {len(jobs)} jobs failed or could not start: {", ".join(failed)}')


def runs_of(
    tables: Sequence[int],
    seeds: Sequence[int],
    bits: Collection[str] = BITS,
    presets: Collection[str] = PRESETS,
    methods: Collection[str] | None = None,
) -> Iterator[Run]:
    """The students of tables, each once, the most urgent first: by seed, then as the tables are named.

    Args:
        tables: Keys of ``TABLES``.
        seeds: Of sets and students.
        bits: Those wanted.
        presets: Those wanted.
        methods: Those wanted; None: all.
    """
    wanted = dict.fromkeys(
        (method, width)
        for number in tables
        for method, width in TABLES[number].runs
        if width in bits and method.split('_')[0] in presets and (methods is None or method in methods)
    )
    for seed in seeds:
        for method, width in wanted:
            shown_in = tuple(number for number in TABLES if (method, width) in TABLES[number].runs)
            yield Run(method, width, seed, shown_in)


def plan(runs: Sequence[Run], weights: Path, work: Path, options: Sequence[str]) -> Iterator[Job]:
    """List the jobs that make students and what these need, the most urgent first.

    Args:
        runs: The students, the most urgent first.
        weights: The teacher as it is published.
        work: Folder of sets and students.
        options: ``KEY=VALUE`` for all of them.
    """
    if not runs:
        return
    convert = ('tools/model_converters/ultralytics_to_mmzsq.py', str(weights), str(TEACHER))
    yield Job(CONVERT, convert, TEACHER.parent, TEACHER)
    sets = {(s.images.name, s.seed): s.images for s in runs if s.images is not None}
    for (_, seed), images in sets.items():
        work_dir = _set_dir(images, seed, work)
        manifest = work_dir / 'calibration_set' / 'manifest.json'
        yield Job(work_dir.name, set_command(images, seed, work, options), work_dir, manifest, (CONVERT,), kind=SET)
    for student in runs:
        own = () if student.images is None else (_set_dir(student.images, student.seed, work).name,)
        work_dir = work / student.name
        command = student_command(student, work, options)
        result = work_dir / 'results.json'
        yield Job(student.name, command, work_dir, result, (CONVERT, *own), resumes=True, kind=STUDENT)


def set_command(images: Images, seed: int, work: Path, options: Iterable[str]) -> tuple[str, ...]:
    """Arguments of ``python`` that make a calibration set."""
    # It does not depend on the bits.
    config = Path(images.config or f'configs/zsq/yolov5-n_{BITS[0]}.py')
    own = {**set_options(images), **_place(images, seed, work)}
    return tool('generate', config, _set_dir(images, seed, work), [*_assignments(own), *options])


def student_command(student: Run, work: Path, options: Iterable[str]) -> tuple[str, ...]:
    """Arguments of ``python`` that make a student, on a calibration set that is there."""
    method = METHODS[student.method]
    config, _ = method.config_for(student.bits)
    chosen = dict(student_options(method, student.bits))
    if chosen.pop('zsq.quantizer.overrides', None):
        config = str(_layer_bits_config(method, student.bits, work))
    own = {
        **chosen,
        **_place(method.images, student.seed, work),
        'default_hooks.checkpoint.interval': max(chosen['zsq.train.max_epochs'] // 4, 1),
    }
    return tool('train', Path(config), work / student.name, [*_assignments(own), *options])


def write_configs(runs: Iterable[Run], work: Path) -> None:
    """Write the configs of students with allocated bits, since ``--cfg-options`` cannot hold them.

    Args:
        runs: All students.
        work: Folder of sets and students; the configs go to ``configs`` in it.
    """
    for student in runs:
        method = METHODS[student.method]
        if overrides := layer_overrides(method, student.bits):
            path = _layer_bits_config(method, student.bits, work)
            base = os.path.relpath(ROOT / method.config_for(student.bits)[0], path.parent.resolve())
            text = f'_base_ = [{Path(base).as_posix()!r}]\nzsq = dict(quantizer=dict(overrides={overrides!r}))\n'
            write(text.encode(), path)


def _layer_bits_config(method: Method, bits: str, work: Path) -> Path:
    return work / 'configs' / f'yolov5-n_{method.layer_bits}_{bits}.py'


def listing(runs: Sequence[Run], kept: Collection[str], work: Path, options: Sequence[str]) -> str:
    """Name each run, the tables that show it and whether its result is kept, with the commands that repeat it."""
    lines = []
    for student in runs:
        tables = ' '.join(map(str, student.tables))
        lines.append(f'{student.name}: table {tables}, {"kept" if student.name in kept else "missing"}')
        if student.images is not None:
            lines.append('    python ' + shlex.join(set_command(student.images, student.seed, work, options)))
        lines.append('    python ' + shlex.join(student_command(student, work, options)))
    missing = sum(student.name not in kept for student in runs)
    return '\n'.join([*lines, f'{len(runs)} runs, {missing} missing', ''])


def keep(job: Job, out: Path) -> str:
    """Copy what a finished job leaves for the repository: results without a place on this machine, or the gallery.

    Returns:
        The accuracies, for a line of progress.
    """
    if job.kind == STUDENT:
        method, bits, _ = job.name.rsplit('_', 2)
        return keep_results(job, out / RESULTS / f'{job.name}.json', METHODS[method].config_for(bits)[0])
    gallery = job.work_dir / 'calibration_set' / 'gallery.png'
    if job.kind == SET and job.name.endswith(f'_seed{GALLERY_SEED}') and gallery.is_file():
        write_gallery(gallery, out / 'docs' / 'images' / 'yolov5-n' / f'{job.work_dir.name}.jpg')
    return ''


def _place(images: Images | None, seed: int, work: Path) -> Options:
    of_set = {} if images is None else {'dir': _set_dir(images, seed, work) / 'calibration_set'}
    return {f'zsq.calibration_set.{key}': value for key, value in {**of_set, 'seed': seed}.items()}


def _set_dir(images: Images, seed: int, work: Path) -> Path:
    return work / f'set_{images.name}_seed{seed}'


def _assignments(options: Options) -> list[str]:
    return [f'{key}={_text(value)}' for key, value in options.items()]


def _text(value: Any) -> str:
    return f'[{",".join(map(str, value))}]' if isinstance(value, tuple) else str(value)


if __name__ == '__main__':
    main()
