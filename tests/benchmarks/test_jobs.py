# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/jobs.py: parallel jobs and their GPUs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import jobs
import pytest

# Records start, end and GPU; it runs until all jobs that may run beside it have started.
SCRIPT = """
import os, sys, time
from pathlib import Path
name = sys.argv[2]
log = Path('events.txt')
def note(event):
    with log.open('a') as file:
        file.write(f'{event} {name} {os.environ.get("CUDA_VISIBLE_DEVICES", "-")}\\n')
note('begin')
time.sleep(0.4)
note('end')
Path(name).touch()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    (tmp_path / 'job.py').write_text(SCRIPT)
    return tmp_path


def job(name: str, kind: str, *needs: str) -> jobs.Job:
    return jobs.Job(name, ('job.py', '-', name), Path('.'), Path(name), needs, kind=kind)


def run(place: Path, *planned: jobs.Job, processes: int, gpus: int) -> list[tuple[str, str, str]]:
    """Events in order: kind, job and GPU."""
    with tempfile.TemporaryFile() as lock:
        assert jobs.run(planned, processes, place, lock.fileno(), lambda job: '', gpus) == []
    lines = (place / 'events.txt').read_text().splitlines()
    return [tuple(line.split()) for line in lines]  # type: ignore[misc]


def beside(events: list[tuple[str, str, str]]) -> set[tuple[str, str, bool]]:
    """Pairs of jobs that ran at the same time, by name, and whether they shared a GPU."""
    found: set[tuple[str, str, bool]] = set()
    running: dict[str, str] = {}
    for event, name, gpu in events:
        if event == 'end':
            del running[name]
            continue
        found |= {(*sorted((name, other)), other_gpu == gpu) for other, other_gpu in running.items()}  # type: ignore[misc]
        running[name] = gpu
    return found


def test_jobs_of_different_kinds_never_share_a_gpu(place: Path) -> None:
    planned = [job('set1', 'set'), job('set2', 'set'), job('student1', 'student'), job('student2', 'student', 'set1')]
    events = run(place, *planned, processes=4, gpus=1)
    assert beside(events) == {('set1', 'set2', True), ('student1', 'student2', True)}
    # There is only one choice.
    assert {gpu for _, _, gpu in events} == {'-'}


def test_important_jobs_start_first_without_idling_a_gpu(place: Path) -> None:
    planned = [job('set1', 'set'), job('student1', 'student'), job('student2', 'student'), job('set2', 'set')]
    events = run(place, *planned, processes=3, gpus=2)
    begun = [(name, gpu) for event, name, gpu in events if event == 'begin']
    assert sorted(begun[:3]) == [('set1', '0'), ('student1', '1'), ('student2', '1')]
    assert not any(shared for one, other, shared in beside(events) if one[:3] != other[:3])


def test_jobs_are_spread_over_the_gpus(place: Path) -> None:
    events = run(place, *(job(str(index), '') for index in range(4)), processes=4, gpus=2)
    gpus = [gpu for event, _, gpu in events if event == 'begin']
    assert sorted(gpus) == ['0', '0', '1', '1']
