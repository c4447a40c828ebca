# SPDX-License-Identifier: Apache-2.0
"""The command line tools: MMDetection's options, one clean message for a user's mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import RUNNERS

from mmzsq import cli, generate, test, train

DETECTOR = """
model = dict(type='YOLOX')
load_from = 'teacher.pth'
runner_type = 'Recording'
test_dataloader = dict(batch_size=1)
test_evaluator = dict(type='CocoMetric')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
"""

Tool = Callable[..., None]


class Recording:
    """A runner that records the calls of the tools."""

    calls: list[tuple[str, Config]] = []

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    @classmethod
    def from_cfg(cls, cfg: Config) -> Recording:
        """Build as MMEngine builds runners."""
        return cls(cfg)

    def __getattr__(self, name: str) -> Callable[[], None]:
        return lambda: Recording.calls.append((name, self.cfg))


@pytest.fixture(autouse=True)
def recorded() -> Iterator[list[tuple[str, Config]]]:
    RUNNERS.register_module(name='Recording', module=Recording)
    Recording.calls = []
    yield Recording.calls
    RUNNERS.module_dict.pop('Recording')


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder with a detector's config and one with a zsq section; also the cwd."""
    (tmp_path / 'detector.py').write_text(DETECTOR)
    (tmp_path / 'zero_shot.py').write_text("_base_ = 'detector.py'\nzsq = dict()\n")
    monkeypatch.chdir(tmp_path)
    # As torchrun and srun set them.
    for variable in ('LOCAL_RANK', 'RANK', 'SLURM_PROCID'):
        monkeypatch.setenv(variable, '0')
    return tmp_path


@pytest.fixture
def call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tool:
    """Run a tool with arguments, as its command line would."""

    def call(tool: Any, *args: str) -> None:
        monkeypatch.setattr(sys, 'argv', ['tool', *args])
        cli.run(tool.main)

    return call


def test_train_runs_what_the_config_names(call: Tool, recorded: list[Any]) -> None:
    call(train, 'detector.py', '--cfg-options', 'optim_wrapper.optimizer.lr=0.5', 'extra=[1,2]')
    [(name, cfg)] = recorded
    assert name == 'train'
    assert cfg.optim_wrapper.optimizer.lr == 0.5
    assert cfg.extra == [1, 2]
    assert cfg.work_dir == 'work_dirs/detector'
    assert cfg.launcher == 'none'


def test_amp_and_work_dir_reach_a_detector(call: Tool, recorded: list[Any]) -> None:
    call(train, 'detector.py', '--amp', '--work-dir', 'elsewhere', '--launcher', 'slurm')
    cfg = recorded[0][1]
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    assert (cfg.work_dir, cfg.launcher) == ('elsewhere', 'slurm')


def test_resume_continues_from_the_last_or_a_given_checkpoint(call: Tool, recorded: list[Any]) -> None:
    call(train, 'detector.py', '--resume')
    call(train, 'detector.py', '--resume', 'epoch_1.pth')
    call(train, 'detector.py')
    assert [(cfg.get('resume'), cfg.load_from) for _, cfg in recorded] == [
        (True, None),
        (True, 'epoch_1.pth'),
        (None, 'teacher.pth'),
    ]


def test_load_from_becomes_the_teacher_if_another_checkpoint_is_loaded(call: Tool, recorded: list[Any]) -> None:
    options = ('--cfg-options', 'load_from=mine.pth')
    call(train, 'zero_shot.py', '--resume', *options)
    call(train, 'zero_shot.py', '--resume', 'epoch_1.pth', *options)
    call(train, 'zero_shot.py', '--resume', *options, 'zsq.teacher=other.pth')
    call(test, 'zero_shot.py', 'epoch_1.pth', *options)
    assert [(cfg.resume, cfg.load_from, cfg.zsq.teacher) for _, cfg in recorded] == [
        (True, None, 'mine.pth'),
        (True, 'epoch_1.pth', 'mine.pth'),
        (True, None, 'other.pth'),
        (False, 'epoch_1.pth', 'mine.pth'),
    ]


@pytest.mark.parametrize(
    ('option', 'message'),
    [('zsq.train.max_epochs', 'KEY=VALUE'), ('zsq.train.image_size=(1,2', 'cannot be read')],
)
def test_an_option_that_cannot_be_read_is_named(
    call: Tool, capsys: pytest.CaptureFixture[str], option: str, message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        call(train, 'zero_shot.py', '--cfg-options', option)
    assert ended.value.code == 2
    assert option in (error := capsys.readouterr().err)
    assert message in error


def test_a_config_without_a_model_is_refused(call: Tool, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / 'empty.py').write_text('')
    with pytest.raises(SystemExit) as ended:
        call(train, 'empty.py')
    assert ended.value.code == 2
    assert "empty.py has no model: add the detector's config to its _base_" in capsys.readouterr().err


@pytest.mark.parametrize(
    ('wrapper', 'on_cpu'),
    [
        (None, dict(type='MMDistributedDataParallel', device_ids=None)),
        (
            dict(find_unused_parameters=True),
            dict(type='MMDistributedDataParallel', find_unused_parameters=True, device_ids=None),
        ),
        (dict(type='mmzsq.AveragingDataParallel'), dict(type='mmzsq.AveragingDataParallel')),
        (dict(type='MMFullyShardedDataParallel'), dict(type='MMFullyShardedDataParallel')),
    ],
)
def test_without_a_gpu_ddp_gets_no_device_and_other_wrappers_are_unchanged(
    wrapper: dict[str, Any] | None,
    on_cpu: dict[str, Any],
    call: Tool,
    recorded: list[Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    joined: list[str] = []
    monkeypatch.setattr(torch.distributed, 'init_process_group', joined.append)
    (folder / 'wrapped.py').write_text(f"_base_ = 'zero_shot.py'\nmodel_wrapper_cfg = {wrapper!r}\n")
    call(train, 'wrapped.py', '--launcher', 'pytorch')
    assert recorded[0][1].model_wrapper_cfg == on_cpu
    assert joined == ['gloo']


def test_amp_reaches_the_student(call: Tool, recorded: list[Any]) -> None:
    call(train, 'zero_shot.py', '--amp')
    assert recorded[0][1].zsq.train.amp is True


def test_test_evaluates_the_checkpoint(call: Tool, recorded: list[Any]) -> None:
    call(test, 'detector.py', 'student.pth', '--cfg-options', 'resume=True')
    [(name, cfg)] = recorded
    assert (name, cfg.load_from, cfg.resume) == ('test', 'student.pth', False)


def test_runtime_options_are_for_exported_files(call: Tool, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (('--runtime', 'openvino'), ('--threads', '1')):
        with pytest.raises(SystemExit):
            call(test, 'detector.py', 'student.pth', *option)
        assert '--runtime and --threads are for an exported .onnx file, not for student.pth' in capsys.readouterr().err


def test_generate_makes_the_set_only(call: Tool, recorded: list[Any]) -> None:
    call(generate, 'zero_shot.py')
    assert [name for name, _ in recorded] == ['generate']


@pytest.mark.parametrize(
    ('tool', 'args', 'message'),
    [
        (train, ['nowhere.py'], 'config nowhere.py does not exist'),
        (train, ['syntax.py'], 'config syntax.py cannot be read: SyntaxError'),
        (train, ['name.py'], "NameError: name 'undefined' is not defined"),
        (train, ['no_base.py'], 'FileNotFoundError'),
        (train, ['twice.py'], 'Duplicate key is not allowed among bases'),
        (train, ['no_import.py'], 'not_a_package'),
        (train, ['student.py', '--cfg-options', 'zsq.quantiser.w_bits=4'], "'quantizer'"),
        (train, ['zero_shot.py', '--auto-scale-lr'], 'zsq.train.optimizer'),
        (train, ['detector.py', '--cfg-options', 'runner_type=Foo'], 'Foo is not in the runner registry. Correct'),
        (train, ['detector.py', '--auto-scale-lr'], 'base_batch_size'),
        (test, ['detector.py', 'c.pth', '--out', 'results.json'], '*.pkl'),
        (test, ['detector.py', 'c.pth', '--show-dir', 'out'], 'default_hooks.visualization'),
        (test, ['no_test.py', 'c.pth'], 'no test_dataloader'),
        (generate, ['detector.py'], 'has no zsq section'),
        (generate, ['zero_shot.py', '--format', 'tflite'], "unknown format 'tflite': choose one of coco, yolo, npy"),
        (generate, ['zero_shot.py', '--format', 'npy', '--format-dir', '.'], '. already holds files'),
        (generate, ['zero_shot.py', '--format-dir', 'out'], '--format-dir names the folder of --format'),
    ],
)
def test_a_mistake_is_one_message_and_code_2(
    tool: Any,
    args: list[str],
    message: str,
    call: Tool,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in {
        'syntax.py': 'model = dict(',
        'name.py': 'model = undefined',
        'no_base.py': "_base_ = 'missing.py'",
        'twice.py': "_base_ = ['detector.py', 'zero_shot.py']",
        'no_import.py': "custom_imports = dict(imports=['not_a_package'])",
        'student.py': "_base_ = 'zero_shot.py'\nrunner_type = 'mmzsq.ZeroShotRunner'",
        'no_test.py': "model = dict(type='YOLOX')",
    }.items():
        (folder / name).write_text(text)
    with pytest.raises(SystemExit) as ended:
        call(tool, *args)
    assert ended.value.code == 2
    assert Recording.calls == []
    error = capsys.readouterr().err
    assert error.startswith('error: ')
    assert message in error
    assert 'Traceback' not in error


@pytest.mark.parametrize(
    ('config', 'runner'), [('zero_shot.py', 'mmzsq.ZeroShotRunner'), ('detector.py', None), ('named.py', 'Recording')]
)
def test_a_zsq_section_selects_the_zero_shot_runner(
    config: str, runner: str | None, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Otherwise MMEngine's runner would train the float detector without a word.
    (folder / 'named.py').write_text("_base_ = 'zero_shot.py'\nrunner_type = 'Recording'\n")
    (folder / 'detector.py').write_text(DETECTOR.replace("runner_type = 'Recording'\n", ''))
    monkeypatch.setattr(RUNNERS, 'build', lambda cfg: cfg.get('runner_type'))
    cfg = Config.fromfile(folder / config)
    cfg.launcher = 'none'
    assert cli.build_runner(cfg) == runner


def test_a_defect_keeps_its_traceback(call: Tool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recording, 'train', lambda self: 1 // 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        call(train, 'detector.py')


def run(*command: str | Path, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=dict(os.environ, **env),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_json_is_written_to_a_new_folder_or_to_standard_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / 'results' / 'benchmarks' / 'one.json'
    cli.write_json(dict(ms=0.5), path)
    cli.write_json(dict(ms=0.5), None)
    assert json.loads(path.read_text()) == json.loads(capsys.readouterr().out) == dict(ms=0.5)


def test_the_script_in_tools_is_the_same_tool(tmp_path: Path, repo: Path) -> None:
    script = repo / 'tools' / 'train.py'
    result = run(sys.executable, script, 'nowhere.py', cwd=tmp_path, PYTHONPATH=str(repo))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == 'error: config nowhere.py does not exist'
    assert 'Traceback' not in result.stderr


def test_print_config_prints_a_config_that_runs(folder: Path, repo: Path) -> None:
    script = repo / 'tools' / 'misc' / 'print_config.py'
    options = ('--cfg-options', 'zsq.quantizer.w_bits=6', '--save-path', 'composed.py')
    result = run(sys.executable, script, 'zero_shot.py', *options, cwd=folder, PYTHONPATH=str(repo))
    assert result.returncode == 0, result.stderr
    printed = Config.fromstring(result.stdout, '.py')
    assert printed.zsq.quantizer.w_bits == 6
    assert printed.model.teacher == 'teacher.pth'
    assert Config.fromfile(folder / 'composed.py').to_dict() == printed.to_dict()


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """Folder with commands that print their arguments, one per line."""
    for name in ('python', 'srun'):
        command = tmp_path / name
        command.write_text('#!/bin/sh\nfor a in "$@"; do echo "$a"; done\n')
        command.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize(
    ('script', 'args', 'first'),
    [
        ('dist_train.sh', ['c.py', '4'], ['train.py', 'c.py']),
        ('dist_generate.sh', ['c.py', '4'], ['generate.py', 'c.py']),
        ('dist_test.sh', ['c.py', 'k.pth', '4'], ['test.py', 'c.py', 'k.pth']),
    ],
)
def test_dist_scripts_start_any_number_of_nodes(
    script: str, args: list[str], first: list[str], fake: Path, repo: Path
) -> None:
    env = {'PATH': f'{fake}:{os.environ["PATH"]}', 'NNODES': '2', 'NODE_RANK': '1'}
    options = ['--cfg-options', 'a="[1,2]"']
    result = run(repo / 'tools' / script, *args, *options, cwd=fake, MASTER_ADDR='10.0.0.1', **env)
    told = result.stdout.splitlines()
    assert {'--nnodes=2', '--node_rank=1', '--nproc_per_node=4', '--master_addr=10.0.0.1'} <= {*told}
    tool = next(i for i, line in enumerate(told) if line.endswith(first[0]))
    assert told[tool + 1 :] == [*first[1:], '--launcher', 'pytorch', *options]


@pytest.mark.parametrize(
    ('script', 'told_first'),
    [('slurm_train.sh', ['c.py', '--work-dir', 'last']), ('slurm_test.sh', ['c.py', 'last'])],
)
def test_slurm_scripts_start_the_processes_of_srun(script: str, told_first: list[str], fake: Path, repo: Path) -> None:
    env = {'PATH': f'{fake}:{os.environ["PATH"]}', 'GPUS': '16', 'SRUN_ARGS': '--qos=high --mem=0'}
    result = run(repo / 'tools' / script, 'part', 'job', 'c.py', 'last', '--amp', cwd=fake, **env)
    told = result.stdout.splitlines()
    assert {'--partition=part', '--job-name=job', '--ntasks=16', '--qos=high', '--mem=0'} <= {*told}
    assert told[-len(told_first) - 3 :] == [*told_first, '--launcher', 'slurm', '--amp']


@pytest.mark.parametrize(
    'script',
    ['dist_train.sh', 'dist_test.sh', 'dist_generate.sh', 'slurm_train.sh', 'slurm_test.sh'],
)
def test_scripts_print_their_usage(script: str, repo: Path) -> None:
    result = run(repo / 'tools' / script, 'one', cwd=repo)
    assert result.returncode == 2
    assert 'usage: ' in result.stderr
