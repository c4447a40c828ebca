# SPDX-License-Identifier: Apache-2.0
"""Tests of the comparison with real images: means over seeds, missing runs, refused input."""

from __future__ import annotations

import argparse
import json
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mmengine.config import Config, DictAction

from mmzsq.config.compose import complete_section

TOOL = 'benchmarks/results_table.py'
README = 'Before.\n\n<!-- comparison of benchmarks/results/cells -->\nold\n<!-- end of comparison -->\n\nAfter.\n'
ZERO_SHOT = "runner_type = 'mmzsq.ZeroShotRunner'\nzsq = dict(quantizer=dict(w_bits={0}, a_bits={0}))\n"
DISTIL = "_base_ = ['../tiny_w{0}a{0}.py']\nzsq = dict(calibration_set=dict(real=dict(type='A', data_root='data/x')))\n"
PLAIN = (
    "_base_ = ['./tiny_w{0}a{0}_lsq-real-distil.py']\nzsq = dict(distillation=dict(losses=[], detection_weight=1.0))\n"
)
FOLDERS = {'': 'configs/cells', '_lsq-real': 'configs/cells/comparison', '_lsq-real-distil': 'configs/cells/comparison'}

Update = Callable[..., str]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the leaves of two bit widths and no run."""
    for suffix, content in {'': ZERO_SHOT, '_lsq-real': PLAIN, '_lsq-real-distil': DISTIL}.items():
        (tmp_path / FOLDERS[suffix]).mkdir(parents=True, exist_ok=True)
        for bits in (4, 8):
            (tmp_path / FOLDERS[suffix] / f'tiny_w{bits}a{bits}{suffix}.py').write_text(content.format(bits))
    (tmp_path / 'README.md').write_text(README)
    return tmp_path


@pytest.fixture
def update(repo: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Update:
    """Run the tool on the README; returns its text."""

    def update(*options: str) -> str:
        monkeypatch.setattr(sys, 'argv', [TOOL, str(root / 'README.md'), '--root', str(root), *options])
        runpy.run_path(str(repo / TOOL), run_name='__main__')
        return (root / 'README.md').read_text()

    return update


def accuracy(box: float) -> dict[str, float]:
    """Three distinct numbers."""
    return {'coco/bbox_mAP': box, 'coco/bbox_mAP_50': box + 0.3, 'coco/segm_mAP': box - 0.1, 'coco/segm_mAP_50': 0.0}


def keep(root: Path, bits: int, suffix: str, seed: int, box: float, teacher: float = 0.55, **changes: Any) -> Path:
    """Write the results of a run; ``box`` is the AP after training, 0.2 above that of PTQ."""
    leaf = f'{FOLDERS[suffix]}/tiny_w{bits}a{bits}{suffix}.py'
    own = Config.fromfile(root / leaf).zsq.to_dict()
    own.setdefault('calibration_set', {}).update(seed=seed, dir=f'work_dirs/set_{seed}')
    own['train'] = dict(max_epochs=3)
    settings = json.loads(json.dumps(complete_section(own)))
    stages = {} if suffix else dict(synthesize=dict(image_size=[48, 64], iterations=5, ms_per_image_iteration=0.1))
    content = dict(
        config=f'/home/somebody/{leaf}',
        preset=settings.pop('preset'),
        quantizer=settings.pop('quantizer'),
        metrics=dict(float=accuracy(teacher), ptq=accuracy(box - 0.2), zero_shot=accuracy(box)),
        model_mb=dict(float=4.0, quantized=1.0),
        calibration_set=dict(statistics=dict(images=6, real=bool(suffix)), stages=stages),
        settings=settings,
        train=dict(iterations=9),
        device='one GPU',
    )
    content.update(changes)
    path = root / 'benchmarks' / 'results' / 'cells' / f'{Path(leaf).stem}_seed{seed}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def other_settings(root: Path) -> None:
    """Keep a second run with another number of images."""
    path = keep(root, 8, '', 1, 0.5)
    content = json.loads(path.read_text())
    content['settings']['calibration_set']['num_images'] += 1
    path.write_text(json.dumps(content))


def cells(markdown: str, first: str) -> list[list[str]]:
    lines = [[cell.strip() for cell in line[1:-1].split('|')] for line in markdown.splitlines() if line[:1] == '|']
    return [line for line in lines if line[0] == first]


def test_without_runs_every_leaf_has_an_empty_row(update: Update) -> None:
    text = update()
    assert cells(text, 'tiny') == [['tiny', 'W8A8', *[''] * 5], ['tiny', 'W4A4', *[''] * 5]]
    assert 'No run yet: all cells are empty.' in text
    assert 'python tools/train.py' not in text
    assert text.startswith('Before.\n') and text.endswith('\nAfter.\n') and 'old' not in text
    update('--check')


def test_a_row_has_the_mean_over_seeds_half_their_range_and_their_number(update: Update, root: Path) -> None:
    for seed, box in enumerate((0.5, 0.51, 0.54)):
        keep(root, 8, '', seed, box)
    keep(root, 8, '_lsq-real', 0, 0.52, teacher=0.552)
    keep(root, 8, '_lsq-real-distil', 0, 0.54)
    text = update()
    [w8, w4] = cells(text, 'tiny')
    # By hand: (50 + 51 + 54) / 3 = 51.7, (54 - 50) / 2 = 2.
    assert w8[3:] == [
        '31.7 ± 2.0 / 61.7 ± 2.0 / 21.7 ± 2.0 (3)',
        '51.7 ± 2.0 / 81.7 ± 2.0 / 41.7 ± 2.0 (3)',
        '52.0 / 82.0 / 42.0 (1)',
        '54.0 / 84.0 / 44.0 (1)',
    ]
    assert w8[2] == '55.0 ± 0.1 / 85.0 ± 0.1 / 45.0 ± 0.1'
    assert w4 == ['tiny', 'W4A4', *[''] * 5]
    assert 'somebody' not in text


def test_missing_runs_are_listed(update: Update, root: Path) -> None:
    keep(root, 8, '', 0, 0.5)
    keep(root, 4, '_lsq-real', 0, 0.4)
    assert (
        'Not run, therefore empty: tiny W8A8: LSQ on real, LSQ on real + distillation; '
        'tiny W4A4: PTQ on synthetic, zero-shot QAT, LSQ on real + distillation.'
    ) in update()
    (root / 'benchmarks/results/cells/tiny_w4a4_lsq-real_seed0.json').unlink()
    assert 'LSQ on real + distillation; tiny W4A4: all.' in update()


def test_unmeasured_is_empty_and_nothing_detected_is_zero(update: Update, root: Path) -> None:
    keep(root, 8, '', 0, 0.5, metrics={})
    keep(root, 8, '_lsq-real', 0, 0.5, metrics=dict(float=accuracy(0.55), ptq={}, zero_shot={}))
    [row, _] = cells(update(), 'tiny')
    assert row[3:] == ['', '', '0.0 / 0.0 / 0.0 (1)', '']


def test_settings_of_runs_are_shown(update: Update, root: Path) -> None:
    for seed in (2, 10):
        keep(root, 8, '', seed, 0.5)
    keep(root, 8, '_lsq-real', 0, 0.5)
    text = update()
    assert cells(text, 'tiny_w8a8') == [['tiny_w8a8', '6 synthetic', '48x64 px x 5', '9 x 16', '2, 10', 'one GPU']]
    assert cells(text, 'tiny_w8a8_lsq-real') == [['tiny_w8a8_lsq-real', '6 real', '', '9 x 16', '0', 'one GPU']]


def test_the_command_repeats_the_settings_of_the_first_seed(update: Update, root: Path) -> None:
    for seed in (1, 2):
        keep(root, 8, '', seed, 0.5)
    path = keep(root, 8, '_lsq-real', 1, 0.5)
    commands = [
        line for line in update().split('```bash\n')[1].split('```')[0].replace('\\\n', ' ').splitlines() if line
    ]
    synthetic, real = (shlex.split(line) for line in commands)
    assert 'zsq.calibration_set.dir=work_dirs/set_1' in synthetic
    # Runs on real images have no calibration set.
    assert real[:3] == ['python', 'tools/train.py', 'configs/cells/comparison/tiny_w8a8_lsq-real.py']
    assert not any('dir' in word for word in real[3:])
    cfg = Config.fromfile(root / real[2])
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    cfg.merge_from_dict(parser.parse_args(real[3:]).cfg_options)
    section = json.loads(json.dumps(complete_section(cfg.zsq.to_dict())))
    recorded = json.loads(path.read_text())['settings']
    for settings in (section, recorded):
        del settings['calibration_set']['dir']
    assert {key: section[key] for key in recorded} == recorded


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (
            lambda root: keep(root, 8, '', 1, 0.5).rename(root / 'benchmarks/results/cells/other.json'),
            'with seed 1: rename it',
        ),
        (
            lambda root: keep(root, 8, '_lsq-real', 0, 0.5, teacher=0.53),
            'tiny in .* had different teachers.*0.530 to 0.550',
        ),
        (other_settings, 'tiny_w8a8.py in .* differ in more than the seed'),
        (lambda root: keep(root, 8, '', 1, 0.5, preset='paper'), 'tiny_w8a8.py in .* differ in more than the seed'),
        (lambda root: (root / 'configs/cells/tiny_w8a8.py').unlink(), 'tiny_w8a8.py is not a config'),
        (lambda root: [path.unlink() for path in root.glob('configs/cells/*.py')], 'no config to compare in'),
    ],
)
def test_a_mistake_is_one_message(update: Update, root: Path, spoil: Callable[[Path], Any], message: str) -> None:
    keep(root, 8, '', 0, 0.5)
    spoil(root)
    with pytest.raises(SystemExit, match=f'^error: .*{message}'):
        update()
    assert (root / 'README.md').read_text() == README


def test_results_of_another_config_are_refused(update: Update, root: Path) -> None:
    path = keep(root, 8, '', 0, 0.5)
    content = json.loads(path.read_text())
    (root / 'configs/zsq').mkdir()
    (root / 'configs/zsq/tiny_w8a8.py').write_text(ZERO_SHOT.format(8))
    path.write_text(json.dumps(dict(content, config='configs/zsq/tiny_w8a8.py')))
    with pytest.raises(SystemExit, match=r'^error: configs/zsq/tiny_w8a8.py is not part of the comparison'):
        update()
