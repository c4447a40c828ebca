# SPDX-License-Identifier: Apache-2.0
"""Repeat the comparison on blood cells in configs/zsq/README.md.

    python benchmarks/bccd.py --jobs 6 --seeds 0 1 2

This trains both teachers, makes a calibration set of each, and quantizes them at every bit width, on the set and on the
real training images. The data set is expected in ``data/bccd``, see configs/bccd/README.md. Jobs run in parallel, each
after its dependencies. After an interruption the tool skips finished jobs and resumes the others. Logs are in
``work_dirs/bccd/logs``. Results of finished runs go to ``benchmarks/results/bccd``, galleries to ``docs/images``.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from jobs import ROOT, Job, keep_results, lock, run, tool, write_gallery

CONFIGS = Path('configs/bccd')
WORK = Path('work_dirs/bccd')
TEACHERS = {'r50': 'mask-rcnn_r50_bccd', 'swin-t': 'mask-rcnn_swin-t_bccd'}
"""Config name of each detector."""
TEACHER_EPOCHS = 64
GALLERY_SEED = 0
BITS = ('w8a8', 'w4a8', 'w6a6')
SUFFIXES = ('', '_lsq-real', '_lsq-real-distil')
"""Suffixes of the leaf configs in ``configs/bccd`` and ``configs/bccd/comparison``."""
CONVERT = 'annotations'


def main() -> None:
    """Parse the command line and run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--jobs', type=int, default=4, help='parallel processes on all GPUs together (default: 4)')
    parser.add_argument('--gpus', type=int, default=1, help='number of GPUs (default: 1)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='seeds of sets and students (default: 0)')
    parser.add_argument('--detectors', nargs='+', choices=list(TEACHERS), default=list(TEACHERS))
    parser.add_argument('--bits', nargs='+', choices=BITS, default=list(BITS))
    parser.add_argument(
        '--out', type=Path, default=ROOT, help='folder for benchmarks/results/ and docs/ (default: this repository)'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        help='settings of all sets and quantized detectors, as in tools/train.py',
    )
    args = parser.parse_args()
    out = args.out.resolve()
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    jobs = list(plan(args.detectors, args.bits, args.seeds, args.cfg_options))
    with lock(WORK) as held:
        failed = run(jobs, max(args.jobs, 1), WORK, held.fileno(), lambda job: keep(job, out), max(args.gpus, 1))
    if failed:
        sys.exit(f'error: {len(failed)} of {len(jobs)} jobs failed or could not start: {", ".join(failed)}')


def plan(detectors: Sequence[str], bits: Sequence[str], seeds: Sequence[int], options: Sequence[str]) -> Iterator[Job]:
    """List the jobs, the most important first.

    Args:
        detectors: Keys of :data:`TEACHERS`.
        bits: Bit widths from :data:`BITS`.
        seeds: Seeds of calibration sets and students.
        options: ``KEY=VALUE`` settings of all sets and students.
    """
    data = Path('data/bccd')
    splits = ('trainval', 'test')
    yield Job(
        CONVERT,
        (
            *('tools/dataset_converters/voc_to_coco.py', str(data), '--splits', *splits),
            *('--classes', 'RBC', 'WBC', 'Platelets', '--masks', 'ellipse'),
        ),
        data,
        data / 'annotations' / f'{splits[-1]}.json',
    )
    teachers = tuple(TEACHERS[detector] for detector in detectors)
    for teacher in teachers:
        work_dir = Path('work_dirs') / teacher
        command = tool('train', CONFIGS / f'{teacher}.py', work_dir, ['default_hooks.checkpoint.interval=5'])
        yield Job(teacher, command, work_dir, work_dir / f'epoch_{TEACHER_EPOCHS}.pth', (CONVERT,), resumes=True)
    for seed in seeds:
        for detector in detectors:
            yield _set_job(TEACHERS[detector], seed, options, teachers)
        for suffix in SUFFIXES:
            for width in bits:
                for detector in detectors:
                    yield _student_job(TEACHERS[detector], width, suffix, seed, options)


def keep(job: Job, out: Path) -> str:
    """Copy the results or the gallery of a finished job to the repository.

    Returns:
        The accuracies, as a note for the progress line.
    """
    gallery = job.work_dir / 'calibration_set' / 'gallery.png'
    if job.name.endswith(f'_set_seed{GALLERY_SEED}') and gallery.is_file():
        write_gallery(gallery, out / 'docs' / 'images' / f'{job.name}.jpg')
    if job.result.name != 'results.json':
        return ''
    return keep_results(job, out / 'benchmarks' / 'results' / 'bccd' / f'{job.name}.json')


def _set_job(teacher: str, seed: int, options: Iterable[str], teachers: tuple[str, ...]) -> Job:
    # All teachers first: a process that replays CUDA graphs leaves little of the GPU to eager processes.
    needs = (teacher, *(other for other in teachers if other != teacher))
    work_dir = _set_dir(teacher, seed)
    # The set does not depend on the bits.
    command = tool('generate', CONFIGS / f'{teacher}_w8a8.py', work_dir, _student_options(teacher, seed, options))
    return Job(work_dir.name, command, work_dir, work_dir / 'calibration_set' / 'manifest.json', needs)


def _student_job(teacher: str, bits: str, suffix: str, seed: int, options: Iterable[str]) -> Job:
    config = CONFIGS / ('comparison' if suffix else '') / f'{teacher}_{bits}{suffix}.py'
    name = f'{config.stem}_seed{seed}'
    overrides = [*_student_options(teacher, seed, options), 'default_hooks.checkpoint.interval=2']
    needs = (teacher,) if suffix else (teacher, _set_dir(teacher, seed).name)
    command = tool('train', config, WORK / name, overrides)
    return Job(name, command, WORK / name, WORK / name / 'results.json', needs, resumes=True)


def _student_options(teacher: str, seed: int, options: Iterable[str]) -> list[str]:
    own = {'seed': seed, 'dir': _set_dir(teacher, seed) / 'calibration_set'}
    return [*(f'zsq.calibration_set.{key}={value}' for key, value in own.items()), *options]


def _set_dir(teacher: str, seed: int) -> Path:
    return WORK / f'{teacher}_set_seed{seed}'


if __name__ == '__main__':
    main()
