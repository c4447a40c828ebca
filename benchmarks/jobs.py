# SPDX-License-Identifier: Apache-2.0
"""Run the jobs of a benchmark in parallel, each after its dependencies.

A job is one process with its own folder and a result file that exists once the job is finished. A benchmark that was
interrupted skips finished jobs and resumes the others. bccd.py and yolo.py define the jobs.
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
"""Last lines of the log of a failed job that are printed."""


@dataclass(frozen=True)
class Job:
    """One process.

    Attributes:
        name: Name of the job and of its log.
        command: Arguments of ``python``.
        work_dir: Output folder. A training resumes from a checkpoint in it.
        result: File that exists once the job is finished.
        needs: Names of the jobs that must finish first.
        resumes: Whether the job needs ``--resume`` to continue; other jobs continue by themselves.
        kind: Jobs of different kinds never share a GPU, because a process that replays CUDA graphs leaves little of the
            GPU to one that launches single kernels.
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
        """Return whether the result exists and is complete."""
        if self.result.suffix == '.pth':
            # MMEngine writes last_checkpoint after the checkpoint itself.
            return last_checkpoint(self.work_dir) == self.result
        return self.result.is_file()

    def arguments(self) -> list[str]:
        """Return the full command, with ``--resume`` if there is a checkpoint."""
        # Without a checkpoint, or if it was being replaced, the job starts over.
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
    """Run jobs in parallel, each after its dependencies, and keep their results.

    Args:
        jobs: The most important first.
        processes: Maximum number of parallel processes.
        work: Folder of the benchmark, for ``logs/``.
        lock: File descriptor that the processes hold while they run.
        keep: Copies the output of a finished job and returns a note for the progress line.
        gpus: Number of GPUs to spread the processes over.

    Returns:
        Names of jobs that failed or depend on a failed job.
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
    """Copy the ``results.json`` of a finished job, with the config path relative to the repository.

    Args:
        job: Job whose result is a ``results.json``.
        path: File to write.
        config: Path of the config in the repository; None takes it from the command.

    Returns:
        The accuracies, as a note for the progress line.
    """
    results = json.loads(job.result.read_text())
    results['config'] = config or job.command[1]
    write(json.dumps(results, indent=2).encode() + b'\n', path)
    metrics: dict[str, Any] = results['metrics']
    shown = [f'{row} {100 * values.get("coco/bbox_mAP", 0.0):.1f}' for row, values in metrics.items()]
    return f': box AP {", ".join(shown) or "not measured"}'


def tool(name: str, config: Path, work_dir: Path, options: Iterable[str]) -> tuple[str, ...]:
    """Return the arguments of ``python`` that run a tool in ``tools/``."""
    return (f'tools/{name}.py', config.as_posix(), '--work-dir', str(work_dir), '--cfg-options', *options)


def last_checkpoint(work_dir: Path) -> Path | None:
    """Return the checkpoint that MMEngine wrote last, or None if there is none."""
    note = work_dir / 'last_checkpoint'
    path = work_dir / Path(note.read_text().strip()).name if note.is_file() else None
    return path if path is not None and path.is_file() else None


def lock(work: Path) -> Any:
    """Lock the folder for this process and its children, so that no second benchmark writes to it."""
    work.mkdir(parents=True, exist_ok=True)
    held = (work / 'lock').open('w')
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        sys.exit(f'error: another run of this tool, or a process that it started, is still running in {work}')
    return held


def write(content: bytes, path: Path) -> None:
    """Write a file and create its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_gallery(source: Path, path: Path) -> None:
    """Convert a gallery to JPEG, which is much smaller than PNG for noisy synthetic images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(source) as gallery:
        gallery.convert('RGB').save(path, quality=75, subsampling=0, optimize=True, progressive=True)


def tell(start: float, text: str) -> None:
    """Print a progress line with the seconds since ``start``."""
    sys.stdout.write(f'[{time.monotonic() - start:5.0f} s] {text}\n')
    sys.stdout.flush()


def _free_gpu(kind: str, running: Sequence[_Running], gpus: int) -> int | None:
    """Return the least loaded GPU that runs only jobs of this kind; None if there is none."""
    jobs = {gpu: [entry.job for entry in running if entry.gpu == gpu] for gpu in range(gpus)}
    free = [gpu for gpu in jobs if all(job.kind == kind for job in jobs[gpu])]
    return min(free, key=lambda gpu: len(jobs[gpu]), default=None)


def _start(job: Job, processes: int, work: Path, lock: int, gpu: int | None) -> subprocess.Popen[bytes]:
    path = _log(job, work)
    path.parent.mkdir(parents=True, exist_ok=True)
    threads = max(len(os.sched_getaffinity(0)) // processes, 1)
    environment = dict(os.environ, OMP_NUM_THREADS=str(threads))
    environment['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    if gpu is not None:
        environment['CUDA_VISIBLE_DEVICES'] = str(gpu)
    with path.open('ab') as log:
        # Jobs stay in the process group of this tool, so that a signal to the group reaches all of them.
        return subprocess.Popen(
            job.arguments(), env=environment, stdout=log, stderr=subprocess.STDOUT, pass_fds=(lock,)
        )


def _log(job: Job, work: Path) -> Path:
    return work / 'logs' / f'{job.name}.log'


def _end_of_log(job: Job, work: Path) -> str:
    path = _log(job, work)
    lines = path.read_text(errors='replace').splitlines()[-LOG_LINES:]
    return '\n'.join(f'    {line}' for line in [*lines, f'({path})'])
