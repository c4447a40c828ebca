# SPDX-License-Identifier: Apache-2.0
"""Processes of a benchmark: as many at once as a machine allows, each once what it needs is there, none twice.

A job is one process with a folder of its own and a file that is there once it is finished. Killed and started again, a
benchmark skips what is finished and goes on with what is not. bccd.py and yolo.py say which jobs there are.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
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
        kind: Jobs of two kinds never share a GPU: one that replays CUDA graphs leaves little of it to one that launches
            kernel by kernel.
    """

    name: str
    command: tuple[str, ...]
    work_dir: Path
    result: Path
    needs: tuple[str, ...] = ()
    resumes: bool = False
    kind: str = ''

    @property
    def finished(self) -> bool:
        """Whether its result is there, whole."""
        if self.result.suffix == '.pth':
            # The file that names it is written after it.
            return last_checkpoint(self.work_dir) == self.result
        return self.result.is_file()

    def arguments(self) -> list[str]:
        """The whole command as it is to be started now."""
        # Nothing to go on from, or a checkpoint that was being replaced: from the start.
        resume = ['--resume'] if self.resumes and last_checkpoint(self.work_dir) is not None else []
        return [sys.executable, *self.command[:2], *resume, *self.command[2:]]


@dataclass(frozen=True)
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    since: float
    gpu: int


def run(
    jobs: Sequence[Job], processes: int, work: Path, lock: int, keep: Callable[[Job], str], gpus: int = 1
) -> list[str]:
    """Run jobs at once, each when those it needs are finished, and keep what they leave.

    Args:
        jobs: The most urgent first.
        processes: How many may run at once.
        work: Folder of the benchmark, for ``logs/``.
        lock: File descriptor that the processes hold as long as they live.
        keep: Copies what a finished job leaves and returns what is to be told of it.
        gpus: Number of GPUs that the processes are spread over.

    Returns:
        Names of jobs that failed, or that need one which did.
    """
    start = time.monotonic()
    finished = {job.name for job in jobs if job.finished}
    waiting = [job for job in jobs if job.name not in finished]
    for job in jobs:
        if job.name in finished:
            keep(job)
    tell(start, f'{len(finished)} of {len(jobs)} jobs are finished, {len(waiting)} to go')
    running: list[_Running] = []
    failed: list[str] = []
    try:
        while waiting or running:
            for job in list(waiting):
                if set(job.needs) & set(failed):
                    waiting.remove(job)
                    failed.append(job.name)
                elif len(running) < processes and finished.issuperset(job.needs):
                    gpu = _free_gpu(job.kind, running, gpus)
                    if gpu is None:
                        continue
                    waiting.remove(job)
                    process = _start(job, processes, work, lock, gpu if gpus > 1 else None)
                    running.append(_Running(job, process, time.monotonic(), gpu))
                    tell(start, f'{job.name}: started')
            for entry in list(running):
                if entry.process.poll() is None:
                    continue
                running.remove(entry)
                job = entry.job
                if entry.process.returncode == 0 and job.finished:
                    finished.add(job.name)
                    seconds = time.monotonic() - entry.since
                    tell(start, f'{job.name}: {seconds:.0f} s, {len(waiting) + len(running)} to go{keep(job)}')
                else:
                    failed.append(job.name)
                    tell(start, f'{job.name}: failed with code {entry.process.returncode}\n{_end_of_log(job, work)}')
            time.sleep(POLL_SECONDS)
    finally:
        for entry in running:
            entry.process.terminate()
        for entry in running:
            entry.process.wait()
    return failed


def keep_results(job: Job, path: Path, config: str | None = None) -> str:
    """Copy the ``results.json`` of a finished job for the repository, without a place on this machine.

    Args:
        job: One whose result that is, of the config in its command.
        path: The file to write.
        config: Path of the config in the repository; None: the one in the command.

    Returns:
        The accuracies, for a line of progress.
    """
    results = json.loads(job.result.read_text())
    results['config'] = config or job.command[1]
    write(json.dumps(results, indent=2).encode() + b'\n', path)
    metrics: dict[str, Any] = results['metrics']
    shown = [f'{row} {100 * values.get("coco/bbox_mAP", 0.0):.1f}' for row, values in metrics.items()]
    return f': box AP {", ".join(shown) or "not measured"}'


def tool(name: str, config: Path, work_dir: Path, options: Iterable[str]) -> tuple[str, ...]:
    """Arguments of ``python`` that run one of the tools in ``tools/``."""
    return (f'tools/{name}.py', config.as_posix(), '--work-dir', str(work_dir), '--cfg-options', *options)


def last_checkpoint(work_dir: Path) -> Path | None:
    """The checkpoint that MMEngine wrote last, if it is still there."""
    note = work_dir / 'last_checkpoint'
    path = work_dir / Path(note.read_text().strip()).name if note.is_file() else None
    return path if path is not None and path.is_file() else None


def lock(work: Path) -> Any:
    """Open a file that this process and those it starts hold: two would write into the same folders."""
    work.mkdir(parents=True, exist_ok=True)
    held = (work / 'lock').open('w')
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(f'error: another run of this tool, or a process that it started, is still at work in {work}')
    return held


def write(content: bytes, path: Path) -> None:
    """Write a file, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_gallery(source: Path, path: Path) -> None:
    """Write a gallery as a JPEG: a tenth of the size of a PNG, since synthetic images are noisy."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as gallery:
        gallery.convert('RGB').save(path, quality=75, subsampling=0, optimize=True, progressive=True)


def tell(start: float, text: str) -> None:
    """Write a line of progress with the seconds since ``start``."""
    sys.stdout.write(f'[{time.monotonic() - start:5.0f} s] {text}\n')
    sys.stdout.flush()


def _free_gpu(kind: str, running: Sequence[_Running], gpus: int) -> int | None:
    """Index of the GPU with the fewest jobs, all of this kind; None if there is none."""
    jobs = {gpu: [entry.job for entry in running if entry.gpu == gpu] for gpu in range(gpus)}
    fit = [gpu for gpu in jobs if all(job.kind == kind for job in jobs[gpu])]
    return min(fit, key=lambda gpu: len(jobs[gpu]), default=None)


def _start(job: Job, processes: int, work: Path, lock: int, gpu: int | None) -> subprocess.Popen[bytes]:
    path = _log(job, work)
    path.parent.mkdir(parents=True, exist_ok=True)
    threads = max(len(os.sched_getaffinity(0)) // processes, 1)
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    environment['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    if gpu is not None:
        environment['CUDA_VISIBLE_DEVICES'] = str(gpu)
    with path.open('ab') as log:
        # In the process group of this tool: what ends the group ends all.
        return subprocess.Popen(
            job.arguments(), env=environment, stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock,)
        )


def _log(job: Job, work: Path) -> Path:
    return work / 'logs' / f'{job.name}.log'


def _end_of_log(job: Job, work: Path) -> str:
    path = _log(job, work)
    lines = path.read_text(errors='replace').splitlines()[-LOG_LINES:]
    return '\n'.join(f'    {line}' for line in [*lines, f'({path})'])
