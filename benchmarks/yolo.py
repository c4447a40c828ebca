# SPDX-License-Identifier: Apache-2.0
"""Repeat the tables of docs/results.md on YOLOv5-n.

    python benchmarks/yolo.py --tables 2 5 --jobs 4 --seeds 0 1
    python benchmarks/yolo.py --tables 2 --list

yolo_methods.py and yolo_tables.py define the runs of each table. The images are expected in ``data/coco`` in COCO's
layout, and ``--weights`` names a YOLOv5-n v6.0 checkpoint. Calibration sets are made first, then students are trained.
The two never share a GPU. Runs with a file in ``benchmarks/results/yolov5-n`` are not repeated; delete the file to
repeat one. After an interruption the tool resumes unfinished jobs. Logs are in ``work_dirs/yolov5-n/logs``, galleries
in ``docs/images/yolov5-n``. ``python benchmarks/results_page.py`` then writes the page.
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
"""Kinds of jobs: synthesis keeps a GPU busy and would starve students, which wait for the host between kernels."""
GALLERY_SEED = 0


@dataclass(frozen=True)
class Run:
    """The run of one student.

    Attributes:
        method: Key of ``METHODS``.
        bits: Bits of weights and activations, such as ``'w4a8'``.
        seed: Seed of the calibration set and of training.
        tables: Numbers of the tables that show it.
    """

    method: str
    bits: str
    seed: int
    tables: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the folder and of the file in ``benchmarks/results/yolov5-n``."""
        return f'{self.method}_{self.bits}_seed{self.seed}'

    @property
    def images(self) -> Images | None:
        """The calibration set; None if the student is trained on real images."""
        return METHODS[self.method].images


def main() -> None:
    """Parse the command line, then list the runs or run the missing ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument(
        '--tables',
        type=int,
        nargs='+',
        choices=list(TABLES),
        default=list(TABLES),
        help='table numbers, the most important first (default: all)',
    )
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='seeds of sets and students (default: 0)')
    parser.add_argument('--bits', nargs='+', choices=BITS, default=list(BITS))
    parser.add_argument('--presets', nargs='+', choices=PRESETS, default=list(PRESETS))
    parser.add_argument('--methods', nargs='+', choices=list(METHODS), metavar='METHOD', help='run these methods only')
    parser.add_argument('--jobs', type=int, default=4, help='parallel processes on all GPUs together (default: 4)')
    parser.add_argument('--gpus', type=int, default=1, help='number of GPUs (default: 1)')
    parser.add_argument(
        '--list', action='store_true', help='print each run with its tables and commands, and start nothing'
    )
    parser.add_argument(
        '--weights',
        type=Path,
        default=Path('checkpoints/yolov5n.pt'),
        help=f'published teacher, converted if {TEACHER} is missing (default: checkpoints/yolov5n.pt)',
    )
    parser.add_argument(
        '--out', type=Path, default=ROOT, help='folder for benchmarks/results/ and docs/ (default: this repository)'
    )
    parser.add_argument('--work-dir', type=Path, default=WORK, help=f'folder of sets and students (default: {WORK})')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        help='settings of all sets and students, as in tools/train.py, for a trial; needs --out and --work-dir',
    )
    args = parser.parse_args()
    out = args.out.resolve()
    weights = args.weights.resolve()
    if args.cfg_options and (out == ROOT or args.work_dir == WORK):
        parser.error('--cfg-options changes the runs of the tables: give --out and --work-dir, too')
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
    """Yield the runs of tables without duplicates, ordered by seed and then by the given order of tables.

    Args:
        tables: Keys of ``TABLES``.
        seeds: Seeds of sets and students.
        bits: Bit widths to include.
        presets: Presets to include.
        methods: Methods to include; None includes all.
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
    """List the jobs of runs and of the sets that they need, the most important first.

    Args:
        runs: The runs, the most important first.
        weights: Published checkpoint of the teacher.
        work: Folder of sets and students.
        options: ``KEY=VALUE`` settings of all of them.
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
    """Return the arguments of ``python`` that make a calibration set."""
    # The set does not depend on the bits.
    config = Path(images.config or f'configs/zsq/yolov5-n_{BITS[0]}.py')
    own = {**set_options(images), **_place(images, seed, work)}
    return tool('generate', config, _set_dir(images, seed, work), [*_assignments(own), *options])


def student_command(student: Run, work: Path, options: Iterable[str]) -> tuple[str, ...]:
    """Return the arguments of ``python`` that train a student on an existing calibration set."""
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
    """List each run with its tables, whether its result is kept, and its commands."""
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
    """Copy the results or the gallery of a finished job to the repository.

    Returns:
        The accuracies, as a note for the progress line.
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
