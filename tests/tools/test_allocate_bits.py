# SPDX-License-Identifier: Apache-2.0
"""Tests of tools/analysis_tools/allocate_bits.py: the written config trains, has its bits and keeps the budget."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config

from mmzsq import train
from mmzsq.config import compose
from mmzsq.engine import ZeroShotRunner
from mmzsq.errors import UserError
from mmzsq.qat import ZeroShotDetector
from mmzsq.quantization.allocation import Budget, allocatable

TOOL = 'tools/analysis_tools/allocate_bits.py'
LEAF = 'configs/zsq/yolov5-p_shapes_w4a4.py'
SMALL = (
    *('zsq.calibration_set.num_images=4', 'zsq.label_sampler.warmup=1', 'zsq.label_sampler.interval=1'),
    *('zsq.synthesis.relabel.image_size=64', 'zsq.synthesis.relabel.iterations=2'),
    *('zsq.synthesis.synthesize.image_size=64', 'zsq.synthesis.synthesize.iterations=2'),
    *('zsq.train.max_epochs=1', 'zsq.train.batch_size=2', 'zsq.train.num_workers=0', 'zsq.train.init_batches=1'),
    # Without the search for the first steps.
    *('zsq.quantizer.weight.init=lsq', 'zsq.quantizer.activation.init=lsq'),
    *('val_dataloader.dataset.num_images=1', 'val_dataloader.dataset.image_size=64'),
    *('val_dataloader.num_workers=0', 'val_dataloader.persistent_workers=False'),
    'val_dataloader.dataset.pipeline.0.to_float32=True',
)
Command = Callable[..., None]


@pytest.fixture
def command(repo: Path, tmp_path: Path, unformatted_configs: None, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run the tool as a user does, in a folder of the test."""
    monkeypatch.chdir(tmp_path)

    def command(*options: str, small: tuple[str, ...] = SMALL) -> None:
        monkeypatch.setattr(sys, 'argv', [TOOL, *options, '--cfg-options', *small])
        runpy.run_path(str(repo / TOOL))['main']()

    return command


def built(path: Path) -> ZeroShotDetector:
    cfg = compose(Config.fromfile(path)).model
    return ZeroShotDetector(**{key: value for key, value in cfg.to_dict().items() if key != 'type'})


@pytest.mark.filterwarnings('ignore:.*instance named of visualizer:UserWarning')
def test_the_config_that_it_writes_trains_with_the_bits_of_the_table(
    command: Command, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'own').mkdir()
    out = tmp_path / 'own' / 'mixed.py'
    budget = ('--average-bits', '4', '--candidates', '8', '3', '4', '--batches', '1')
    command(str(repo / LEAF), *budget, '--out', 'own/mixed.py', '--work-dir', 'first')

    free = {layer.name: layer for layer in allocatable(built(repo / LEAF).report)}
    report = built(out).report
    layers = {layer.name: layer for layer in report.layers}
    bits = {name: layers[name].w_bits for name in free}
    weights = sum(layer.weights for layer in free.values())
    assert set(bits.values()) == {3, 4, 8}
    spent = sum(free[name].weights * of for name, of in bits.items())
    assert 3.99 * weights < spent <= 4 * weights
    assert report.size_after <= built(repo / LEAF).report.size_after
    assert all(layers[name].a_bits == 4 for name in free)
    # First and last layers keep their own.
    assert {layer.w_bits for layer in report.layers if layer.role} == {8}
    printed = capsys.readouterr().out
    for name, of in bits.items():
        [row] = [line for line in printed.splitlines() if f' {name} ' in line]
        assert [cell.strip() for cell in row.strip('│').split('│')][:4] == [name, str(free[name].weights), str(of), '4']
    text = out.read_text()
    command_line = ' '.join(['python', TOOL, str(repo / LEAF), *budget])
    assert command_line in ' '.join(text.replace('\\\n', ' ').split())
    # Of the size in which the model runs once when it is built.
    name = 'bit operations of one 64x64 px image'
    sizes = f'Model size and {name} {report.size_after:.3f} MB, {(report.bops_after or 0) / 1e9:.3f} G'
    assert sizes in text and sizes in printed

    # As it stands, from the same folder: same settings, and the set is not made again.
    made = (tmp_path / 'first/calibration_set/manifest.json').stat().st_mtime_ns
    monkeypatch.setattr(sys, 'argv', ['train.py', 'own/mixed.py'])
    train.main()
    results = json.loads((tmp_path / 'work_dirs/mixed/results.json').read_text())
    assert results['calibration_set']['statistics']['images'] == 4
    assert results['model_mb']['quantized'] == report.size_after
    assert (tmp_path / 'first/calibration_set/manifest.json').stat().st_mtime_ns == made
    assert not (tmp_path / 'work_dirs/mixed/calibration_set').exists()


def test_options_are_written_to_the_config(repo: Path, tmp_path: Path) -> None:
    tool = runpy.run_path(str(repo / TOOL))
    options = {'load_from': "a'b.pth", 'val_dataloader.dataset.pipeline.1.to_float32': True, 'zsq.train.amp': None}
    cfg = Config.fromfile(repo / LEAF)
    cfg.merge_from_dict(options)
    (tmp_path / 'sub').mkdir()
    out = tmp_path / 'sub' / 'out.py'
    out.write_text(tool['leaf'](str(repo / LEAF), out, tool['_given'](cfg, options), 'Words.'))
    read = Config.fromfile(out)
    assert read.to_dict() == cfg.to_dict()


def test_bit_operations_are_bounded_for_weights_and_inputs_alike(repo: Path) -> None:
    report = built(repo / LEAF).report
    budget = Budget.from_bit_operations(report, (3, 4, 6), (report.bops_after or 0) / 1e9)
    assert budget.uniform() == 4
    assert {(of.w_bits, of.a_bits) for of in budget.allocate([[3, 2, 1]] * len(budget.layers))} <= {
        (3, 3),
        (4, 4),
        (6, 6),
    }


@pytest.mark.filterwarnings('ignore:.*instance named of:UserWarning')
def test_invalid_budgets_are_refused_before_synthesis(
    command: Command, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(runner: Any) -> None:
        raise AssertionError('a set was to be made')

    monkeypatch.setattr(ZeroShotRunner, 'generate', never)
    leaf, four = str(repo / LEAF), ('--average-bits', '4')
    for message, options in (
        (r'budget is 1 bits .*least possible is 2\.0000 bits', (leaf, '--average-bits', '1', '--out', 'out.py')),
        (r'budget is 0\.05 MB .*least possible is 0\.\d{4} MB', (leaf, '--budget-size-mb', '0.05', '--out', 'out.py')),
        (
            r'budget is 0\.01 G \(bit operations of one 64x64 px image\).*least possible is 0\.\d{4} G',
            (leaf, '--budget-gbops', '0.01', '--out', 'out.py'),
        ),
        ('--candidates is 9', (leaf, *four, '--candidates', '9', '--out', 'out.py')),
        ('--batches must be', (leaf, *four, '--batches', '0', '--out', 'out.py')),
        ('must be a .py file', (leaf, *four, '--out', 'out.txt')),
        ('does not exist', (leaf, *four, '--out', 'nowhere/out.py')),
        ('is the input config', (leaf, *four, '--out', leaf)),
        ('in one process', (leaf, *four, '--out', 'out.py', '--launcher', 'pytorch')),
        ('has no zsq section', (str(repo / 'configs/shapes/yolov5-p_shapes.py'), *four, '--out', 'out.py')),
    ):
        with pytest.raises(UserError, match=message):
            command(*options, small=('randomness.seed=0',))
    assert not list(tmp_path.glob('*.py'))
    for budgets in ((), (*four, '--budget-gbops', '1')):
        with pytest.raises(SystemExit):
            command(leaf, *budgets, '--out', 'out.py', small=('randomness.seed=0',))


def test_a_mistake_is_one_message(
    repo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, 'argv', [TOOL, 'absent.py', '--average-bits', '4', '--out', 'out.py'])
    with pytest.raises(SystemExit, match='2'):
        runpy.run_path(str(repo / TOOL), run_name='__main__')
    assert capsys.readouterr().err == 'error: config absent.py does not exist\n'
