# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/bccd.py: planned jobs, their order, and resuming after a kill."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mmengine.config import Config
from PIL import Image

TOOL = 'benchmarks/bccd.py'

# Replaces every script that a job runs: records its arguments, then writes the expected files.
SCRIPT = """
import json, sys, time
from pathlib import Path
from PIL import Image
name, *arguments = sys.argv[1:]
work_dir = Path(arguments[arguments.index('--work-dir') + 1])
with open('began.txt', 'a') as log:
    log.write(' '.join([work_dir.name, *arguments]) + '\\n')
behavior = json.loads(Path('behavior.json').read_text()).get(work_dir.name, '')
if behavior == 'fail':
    sys.exit('no such cell')
if behavior == 'hang':
    work_dir.mkdir(parents=True)
    (work_dir / 'epoch_2.pth').touch()
    (work_dir / 'last_checkpoint').write_text(str(work_dir / 'epoch_2.pth'))
    time.sleep(60)
if name == 'generate':
    (work_dir / 'calibration_set').mkdir(parents=True)
    Image.new('RGB', (len(work_dir.name), 8)).save(work_dir / 'calibration_set' / 'gallery.png')
    (work_dir / 'calibration_set' / 'manifest.json').write_text('{}')
elif work_dir.parent.name == 'bccd':
    work_dir.mkdir(parents=True, exist_ok=True)
    metrics = dict(float={'coco/bbox_mAP': 0.55}, zero_shot={'coco/bbox_mAP': 0.541})
    (work_dir / 'results.json').write_text(json.dumps(dict(config='/home/somebody/' + arguments[0], metrics=metrics)))
else:
    work_dir.mkdir(parents=True, exist_ok=True)
    last = work_dir / 'epoch_64.pth'
    last.touch()
    (work_dir / 'last_checkpoint').write_text(str(last))
"""
R50 = 'mask-rcnn_r50_bccd'
SWIN = 'mask-rcnn_swin-t_bccd'


@pytest.fixture(scope='module')
def tool(repo: Path) -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(repo / TOOL)))


@pytest.fixture
def root(repo: Path, tmp_path: Path) -> Path:
    """A repository with this tool, where the script above replaces all others."""
    for name in ('train', 'generate'):
        path = tmp_path / 'tools' / f'{name}.py'
        path.parent.mkdir(exist_ok=True)
        path.write_text(SCRIPT.replace('= sys.argv[1:]', f"= ['{name}', *sys.argv[1:]]"))
    (tmp_path / 'benchmarks').mkdir()
    for name in (TOOL, 'benchmarks/jobs.py'):
        (tmp_path / name).write_text((repo / name).read_text())
    (tmp_path / 'data' / 'bccd' / 'annotations').mkdir(parents=True)
    (tmp_path / 'data' / 'bccd' / 'annotations' / 'test.json').touch()
    (tmp_path / 'behavior.json').write_text('{}')
    return tmp_path


def run(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, root / TOOL, '--jobs', '3', *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def began(root: Path) -> list[str]:
    """Names of the folders of the jobs, in the order of their start."""
    return [line.split()[0] for line in (root / 'began.txt').read_text().splitlines()]


def test_plan_has_a_job_for_every_leaf_config(repo: Path, tool: SimpleNamespace) -> None:
    jobs = {job.name: job for job in tool.plan(['r50', 'swin-t'], tool.BITS, [0, 2], [])}
    # Conversion and teachers; for each seed two sets, and three students of each of six leaves.
    assert len(jobs) == 3 + 2 * (2 + 18)
    # YOLOX-nano is not in the comparison.
    leaves = {path.relative_to(repo).as_posix() for path in (repo / 'configs/bccd').rglob('mask-rcnn*_w?a?*.py')}
    assert {job.command[1] for job in jobs.values() if job.command[0] == 'tools/train.py'} - leaves == {
        f'configs/bccd/{R50}.py',
        f'configs/bccd/{SWIN}.py',
    }
    assert len(leaves) == 18
    for job in jobs.values():
        if job.command[1] in leaves:
            # The student waited for the teacher that its leaf names.
            assert Config.fromfile(repo / job.command[1]).load_from == str(jobs[job.needs[0]].result)
    # Their CUDA graphs would delay a teacher on the same GPU.
    assert jobs[f'{R50}_set_seed0'].needs == (R50, SWIN)
    assert jobs[f'{SWIN}_set_seed0'].needs == (SWIN, R50)
    student = jobs[f'{SWIN}_w4a8_seed2']
    assert student.needs == (SWIN, f'{SWIN}_set_seed2')
    of_set = jobs[f'{SWIN}_set_seed2'].work_dir / 'calibration_set'
    for bits in tool.BITS:
        options = jobs[f'{SWIN}_{bits}_seed2'].command
        assert {f'zsq.calibration_set.dir={of_set}', 'zsq.calibration_set.seed=2'} <= set(options)
    assert jobs[f'{SWIN}_w4a8_lsq-real_seed2'].needs == (SWIN,)
    for job in jobs.values():
        assert set(job.needs) <= set(jobs)


def test_jobs_run_once_after_their_dependencies_and_results_are_kept(root: Path) -> None:
    done = run(root, '--bits', 'w8a8', '--cfg-options', 'zsq.train.max_epochs=2')
    assert done.returncode == 0, done.stdout + done.stderr
    order = began(root)
    assert len(order) == len(set(order)) == 2 + 2 + 6
    for detector in (R50, SWIN):
        assert order.index(detector) < order.index(f'{detector}_set_seed0') < order.index(f'{detector}_w8a8_seed0')
        assert order.index(detector) < order.index(f'{detector}_w8a8_lsq-real_seed0')
    # Both teachers run at once, with separate settings.
    assert set(order[:2]) == {R50, SWIN}
    told = [line.split()[0] for line in (root / 'began.txt').read_text().splitlines() if 'max_epochs=2' in line]
    assert set(told) == set(order) - {R50, SWIN}
    kept = {path.stem: json.loads(path.read_text()) for path in (root / 'benchmarks/results/bccd').glob('*.json')}
    assert set(kept) == {f'{d}_w8a8{s}_seed0' for d in (R50, SWIN) for s in ('', '_lsq-real', '_lsq-real-distil')}
    assert kept[f'{R50}_w8a8_lsq-real_seed0']['config'] == f'configs/bccd/comparison/{R50}_w8a8_lsq-real.py'
    with Image.open(root / f'docs/images/{SWIN}_set_seed0.jpg') as gallery:
        assert gallery.format == 'JPEG' and gallery.width == len(f'{SWIN}_set_seed0')
    assert f'{R50}_w8a8_seed0: ' in done.stdout and 'box AP float 55.0, zero_shot 54.1' in done.stdout
    # The second run has nothing to do but to restore lost copies.
    (root / f'benchmarks/results/bccd/{R50}_w8a8_seed0.json').unlink()
    assert run(root, '--bits', 'w8a8').returncode == 0
    assert began(root) == order
    assert (root / f'benchmarks/results/bccd/{R50}_w8a8_seed0.json').is_file()


def test_a_failure_stops_dependent_jobs_only(root: Path) -> None:
    (root / 'behavior.json').write_text(json.dumps({f'{R50}_set_seed0': 'fail'}))
    done = run(root, '--bits', 'w8a8', '--detectors', 'r50')
    assert done.returncode == 1
    assert 'no such cell' in done.stdout
    assert f'2 of 6 jobs failed or could not start: {R50}_set_seed0, {R50}_w8a8_seed0' in done.stderr
    assert len(list((root / 'benchmarks/results/bccd').glob('*_lsq-real*'))) == 2


def test_unfinished_jobs_resume_after_a_kill(root: Path) -> None:
    student = f'{R50}_w8a8_lsq-real_seed0'
    (root / 'behavior.json').write_text(json.dumps({student: 'hang'}))
    options = [sys.executable, root / TOOL, '--jobs', '1', '--bits', 'w8a8', '--detectors', 'r50']
    process = subprocess.Popen(options, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: (root / 'work_dirs/bccd' / student / 'last_checkpoint').is_file())
    second = run(root)
    assert second.returncode == 1 and 'still running in work_dirs/bccd' in second.stderr
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 143
    before = began(root)
    (root / 'behavior.json').write_text('{}')
    done = run(root, '--bits', 'w8a8', '--detectors', 'r50')
    # The lock would reveal a process that still runs.
    assert done.returncode == 0, done.stderr
    lines = (root / 'began.txt').read_text().splitlines()
    # Two jobs side by side: either may be the first to write its line.
    started = sorted(line.split()[0] for line in lines[len(before) :])
    assert started == sorted([student, f'{R50}_w8a8_lsq-real-distil_seed0'])
    resumed = {line.split()[0] for line in lines if '--resume' in line}
    assert resumed == {student}


def test_a_partly_replaced_checkpoint_is_ignored(tool: SimpleNamespace, tmp_path: Path) -> None:
    job = tool.Job('a', ('train.py', 'a.py'), tmp_path, tmp_path / 'epoch_9.pth', resumes=True)
    assert job.arguments()[1:] == ['train.py', 'a.py']
    # MMEngine removes the old file before it writes the new one, and updates last_checkpoint after that.
    (tmp_path / 'last_checkpoint').write_text('elsewhere/epoch_4.pth')
    (tmp_path / 'epoch_9.pth').touch()
    assert job.arguments()[1:] == ['train.py', 'a.py']
    assert not job.finished
    (tmp_path / 'epoch_4.pth').touch()
    assert job.arguments()[1:] == ['train.py', 'a.py', '--resume']
    (tmp_path / 'last_checkpoint').write_text('elsewhere/epoch_9.pth')
    assert job.finished


def until(condition: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
