# SPDX-License-Identifier: Apache-2.0
"""Repeat the comparison on blood cells of configs/zsq/README.md, as much of it at once as one GPU allows.

    python tools/benchmarks/bccd.py --jobs 6 --seeds 0 1 2

trains both teachers, makes a calibration set of each, and quantizes them on it and on the real training images at every
bit width. ``data/bccd`` holds the data set, see configs/bccd/README.md. A job starts as soon as what it needs is there.
Killed and started again, the tool skips what is finished and goes on with what is not. Logs are in
``work_dirs/bccd/logs``; the results of every finished run go to ``results/bccd``, galleries to ``docs/images``.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = Path('configs/bccd')
WORK = Path('work_dirs/bccd')
TEACHERS = {'r50': ('mask-rcnn_r50_bccd', 30), 'swin-t': ('mask-rcnn_swin-t_bccd', 40)}
"""Name of a detector's config, and the epochs that it trains for."""
GALLERY_SEED = 0
BITS = ('w8a8', 'w4a8', 'w6a6')
SUFFIXES = ('', '_lsq-real', '_lsq-real-distil')
"""Of the leaves in ``configs/bccd`` and its ``comparison``."""
CONVERT = 'annotations'
POLL_SECONDS = 0.1
LOG_LINES = 8
"""Of a failed job's log that are shown."""


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        name: Its own, and of its log.
        command: What follows ``python``.
        work_dir: Where it writes; a checkpoint of an unfinished training there is gone on from.
        result: The file that is there once it is finished.
        needs: Names of the jobs that come before.
        resumes: Whether ``--resume`` makes it go on; others do so by themselves.
    """

    name: str
    command: tuple[str, ...]
    work_dir: Path
    result: Path
    needs: tuple[str, ...] = ()
    resumes: bool = False

    @property
    def finished(self) -> bool:
        """Whether its result is there, whole."""
        if self.result.suffix == '.pth':
            # The file that names it is written after it.
            return _last_checkpoint(self.work_dir) == self.result
        return self.result.is_file()

    def arguments(self) -> list[str]:
        """The whole command as it is to be started now."""
        # Nothing to go on from, or a checkpoint that was being replaced: from the start.
        resume = ['--resume'] if self.resumes and _last_checkpoint(self.work_dir) is not None else []
        return [sys.executable, *self.command[:2], *resume, *self.command[2:]]


def main() -> None:
    """Parse the command line and run what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--jobs', type=int, default=4, help='processes at once (default: 4)')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0], help='of sets and students (default: 0)')
    parser.add_argument('--detectors', nargs='+', choices=list(TEACHERS), default=list(TEACHERS))
    parser.add_argument('--bits', nargs='+', choices=BITS, default=list(BITS))
    parser.add_argument(
        '--out', type=Path, default=ROOT, help='folder for results/ and docs/ (default: this repository)'
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        default=[],
        help='settings of all sets and quantized detectors, as of tools/train.py',
    )
    args = parser.parse_args()
    out = args.out.resolve()
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    jobs = list(plan(args.detectors, args.bits, args.seeds, args.cfg_options))
    with _lock() as lock:
        failed = run(jobs, max(args.jobs, 1), out, lock.fileno())
    if failed:
        sys.exit(f'error: {len(failed)} of {len(jobs)} jobs failed or could not start: {", ".join(failed)}')


def plan(detectors: Sequence[str], bits: Sequence[str], seeds: Sequence[int], options: Sequence[str]) -> Iterator[Job]:
    """List the jobs, the most urgent first.

    Args:
        detectors: Keys of :data:`TEACHERS`.
        bits: Of :data:`BITS`.
        seeds: A calibration set and students of each.
        options: ``KEY=VALUE`` for all sets and students.
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
    teachers = tuple(TEACHERS[detector][0] for detector in detectors)
    for detector in detectors:
        teacher, epochs = TEACHERS[detector]
        work_dir = Path('work_dirs') / teacher
        command = _tool('train', CONFIGS / f'{teacher}.py', work_dir, ['default_hooks.checkpoint.interval=5'])
        yield Job(teacher, command, work_dir, work_dir / f'epoch_{epochs}.pth', (CONVERT,), resumes=True)
    for seed in seeds:
        for detector in detectors:
            yield _set_job(TEACHERS[detector][0], seed, options, teachers)
        for suffix in SUFFIXES:
            for width in bits:
                for detector in detectors:
                    yield _student_job(TEACHERS[detector][0], width, suffix, seed, options)


def run(jobs: Sequence[Job], processes: int, out: Path, lock: int) -> list[str]:
    """Run jobs at once, each when those it needs are finished, and keep what they leave.

    Args:
        jobs: The most urgent first.
        processes: How many may run at once.
        out: Folder with ``results/`` and ``docs/``.
        lock: File descriptor that the processes hold as long as they live.

    Returns:
        Names of jobs that failed, or that need one which did.
    """
    start = time.monotonic()
    finished = {job.name for job in jobs if job.finished}
    waiting = [job for job in jobs if job.name not in finished]
    for job in jobs:
        if job.name in finished:
            keep(job, out)
    _tell(start, f'{len(finished)} of {len(jobs)} jobs are finished, {len(waiting)} to go')
    running: dict[str, tuple[Job, subprocess.Popen[bytes], float]] = {}
    failed: list[str] = []
    try:
        while waiting or running:
            for job in list(waiting):
                if set(job.needs) & set(failed):
                    waiting.remove(job)
                    failed.append(job.name)
                elif len(running) < processes and finished.issuperset(job.needs):
                    waiting.remove(job)
                    running[job.name] = (job, _start(job, processes, lock), time.monotonic())
                    _tell(start, f'{job.name}: started')
            for job, process, since in list(running.values()):
                if process.poll() is None:
                    continue
                del running[job.name]
                if process.returncode == 0 and job.finished:
                    finished.add(job.name)
                    seconds = time.monotonic() - since
                    _tell(start, f'{job.name}: {seconds:.0f} s, {len(waiting) + len(running)} to go{keep(job, out)}')
                else:
                    failed.append(job.name)
                    _tell(start, f'{job.name}: failed with code {process.returncode}\n{_end_of_log(job)}')
            time.sleep(POLL_SECONDS)
    finally:
        for _, process, _ in running.values():
            process.terminate()
        for _, process, _ in running.values():
            process.wait()
    return failed


def keep(job: Job, out: Path) -> str:
    """Copy what a finished job leaves for the repository: results without a place on this machine, or the gallery.

    Returns:
        The accuracies, for a line of progress.
    """
    gallery = job.work_dir / 'calibration_set' / 'gallery.png'
    if job.name.endswith(f'_set_seed{GALLERY_SEED}') and gallery.is_file():
        _copy(gallery.read_bytes(), out / 'docs' / 'images' / f'{job.name}.png')
    if job.result.name != 'results.json':
        return ''
    results = json.loads(job.result.read_text())
    results['config'] = job.command[1]
    _copy((json.dumps(results, indent=2) + '\n').encode(), out / 'results' / 'bccd' / f'{job.name}.json')
    metrics: dict[str, Any] = results['metrics']
    shown = [f'{row} {100 * values.get("coco/bbox_mAP", 0.0):.1f}' for row, values in metrics.items()]
    return f': box AP {", ".join(shown) or "not measured"}'


def _set_job(teacher: str, seed: int, options: Iterable[str], teachers: tuple[str, ...]) -> Job:
    # All teachers first: a process that replays graphs leaves those that launch kernel by kernel little of the GPU.
    needs = (teacher, *(other for other in teachers if other != teacher))
    work_dir = _set_dir(teacher, seed)
    # The set does not depend on the bits.
    command = _tool('generate', CONFIGS / f'{teacher}_w8a8.py', work_dir, _student_options(teacher, seed, options))
    return Job(work_dir.name, command, work_dir, work_dir / 'calibration_set' / 'manifest.json', needs)


def _student_job(teacher: str, bits: str, suffix: str, seed: int, options: Iterable[str]) -> Job:
    config = CONFIGS / ('comparison' if suffix else '') / f'{teacher}_{bits}{suffix}.py'
    name = f'{config.stem}_seed{seed}'
    overrides = [*_student_options(teacher, seed, options), 'default_hooks.checkpoint.interval=2']
    needs = (teacher,) if suffix else (teacher, _set_dir(teacher, seed).name)
    command = _tool('train', config, WORK / name, overrides)
    return Job(name, command, WORK / name, WORK / name / 'results.json', needs, resumes=True)


def _student_options(teacher: str, seed: int, options: Iterable[str]) -> list[str]:
    own = {'seed': seed, 'dir': _set_dir(teacher, seed) / 'calibration_set'}
    return [*(f'zsq.calibration_set.{key}={value}' for key, value in own.items()), *options]


def _set_dir(teacher: str, seed: int) -> Path:
    return WORK / f'{teacher}_set_seed{seed}'


def _tool(name: str, config: Path, work_dir: Path, options: Iterable[str]) -> tuple[str, ...]:
    return (f'tools/{name}.py', config.as_posix(), '--work-dir', str(work_dir), '--cfg-options', *options)


def _last_checkpoint(work_dir: Path) -> Path | None:
    """The checkpoint that MMEngine wrote last, if it is still there."""
    note = work_dir / 'last_checkpoint'
    path = work_dir / Path(note.read_text().strip()).name if note.is_file() else None
    return path if path is not None and path.is_file() else None


def _lock() -> Any:
    """Held by this process and those it starts: two would write into the same folders."""
    WORK.mkdir(parents=True, exist_ok=True)
    lock = (WORK / 'lock').open('w')
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(f'error: another run of this tool, or a process that it started, is still at work in {WORK}')
    return lock


def _start(job: Job, processes: int, lock: int) -> subprocess.Popen[bytes]:
    path = _log(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    threads = max(len(os.sched_getaffinity(0)) // processes, 1)
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    environment['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    with path.open('ab') as log:
        # In the process group of this tool: what ends the group ends all.
        return subprocess.Popen(
            job.arguments(), env=environment, stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock,)
        )


def _log(job: Job) -> Path:
    return WORK / 'logs' / f'{job.name}.log'


def _end_of_log(job: Job) -> str:
    lines = _log(job).read_text(errors='replace').splitlines()[-LOG_LINES:]
    return '\n'.join(f'    {line}' for line in [*lines, f'({_log(job)})'])


def _copy(content: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _tell(start: float, text: str) -> None:
    sys.stdout.write(f'[{time.monotonic() - start:5.0f} s] {text}\n')
    sys.stdout.flush()


if __name__ == '__main__':
    main()
