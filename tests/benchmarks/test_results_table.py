# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/results_table.py: numbers of the READMEs and of the model index match the runs."""

from __future__ import annotations

import argparse
import copy
import json
import runpy
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from kept_runs import differences
from mmengine.config import Config, DictAction

from mmzsq.config.compose import complete_section

TOOL = 'benchmarks/results_table.py'
README = 'Text before.\n\n<!-- table of benchmarks/results/run -->\nold\n<!-- end of table -->\n\nText after.\n'
LEAF = (
    "runner_type = 'mmzsq.ZeroShotRunner'\nzsq = dict(quantizer=dict(w_bits={}, a_bits={}), train=dict(max_epochs=3))\n"
)


def results(**changes: Any) -> dict[str, Any]:
    """Results of a W4A4 run with changed settings, with the keys that the tool reads."""
    own = dict(
        quantizer=dict(w_bits=4, a_bits=4),
        calibration_set=dict(dir='/somewhere/set', num_images=6, seed=7),
        label_sampler=dict(warmup=2),
        synthesis=dict(
            betas=(0.5, 0.9), cutout=dict(probability=0.3), synthesize=dict(image_size=64, iterations=5, batch_size=2)
        ),
        # Another type with the rate of the preset.
        train=dict(max_epochs=2, batch_size=3, ema=0.99, optimizer=dict(type='AdamW', lr=2e-4)),
    )
    section = json.loads(json.dumps(complete_section(own)))
    return dict(
        config='/home/somebody/configs/mmzsq/configs/zsq/tiny_w4a4.py',
        preset='default',
        quantizer=section.pop('quantizer'),
        metrics=dict(
            float={'coco/bbox_mAP': 0.294, 'coco/bbox_mAP_50': 0.4449},
            ptq={},
            zero_shot={'coco/bbox_mAP': 0.2, 'coco/bbox_mAP_50': 0.332},
        ),
        model_mb=dict(float=7.52674, quantized=1.090664),
        calibration_set=dict(
            statistics=dict(images=6),
            stages=dict(
                relabel=dict(image_size=[32, 32], iterations=4, ms_per_image_iteration=0.18391),
                synthesize=dict(image_size=[64, 48], iterations=5, ms_per_image_iteration=0.9936),
            ),
        ),
        settings=section,
        train=dict(iterations=4),
        device='one GPU',
        **changes,
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with the leaves of two bit widths, one run, and a README."""
    (tmp_path / 'configs' / 'zsq').mkdir(parents=True)
    for w_bits, a_bits in ((4, 4), (8, 8)):
        leaf = tmp_path / 'configs' / 'zsq' / f'tiny_w{w_bits}a{a_bits}.py'
        leaf.write_text(LEAF.format(w_bits, a_bits))
    (tmp_path / 'benchmarks' / 'results' / 'run').mkdir(parents=True)
    keep(tmp_path, results())
    (tmp_path / 'README.md').write_text(README)
    return tmp_path


def keep(root: Path, content: dict[str, Any], name: str = 'tiny_w4a4_default') -> None:
    (root / 'benchmarks' / 'results' / 'run' / f'{name}.json').write_text(json.dumps(content))


def run(repo: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, 'argv', [TOOL, *map(str, arguments)])
    runpy.run_path(str(repo / TOOL), run_name='__main__')


@pytest.fixture
def written(repo: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The README with its tables."""
    run(repo, monkeypatch, root / 'README.md', '--root', root)
    return (root / 'README.md').read_text()


def rows(markdown: str, bits: str) -> list[list[str]]:
    table = [[cell.strip() for cell in line[1:-1].split('|')] for line in markdown.splitlines() if line[:1] == '|']
    return [row for row in table if bits in row]


def test_a_row_shows_the_measurements_of_its_run(written: str) -> None:
    [accuracy, _, how] = rows(written, 'W4A4')
    assert accuracy == ['tiny', 'default', 'W4A4', '29.4 / 44.5', '0.0 / 0.0', '20.0 / 33.2', '7.53', '1.09']
    assert how[3:] == ['6', '32 px x 4, 64x48 px x 5', '0.184, 0.994', '4 x 3', '7', 'one GPU']


def of_seed(seed: int, ap: float) -> dict[str, Any]:
    content = results()
    content['settings']['calibration_set'].update(seed=seed, dir=f'/somewhere/{seed}')
    content['metrics']['zero_shot']['coco/bbox_mAP'] = ap
    return content


def test_several_seeds_are_one_row_of_means(repo: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / 'benchmarks' / 'results' / 'run' / 'tiny_w4a4_default.json').unlink()
    for seed, ap in ((11, 0.25), (2, 0.2)):
        keep(root, of_seed(seed, ap), f'tiny_w4a4_default_seed{seed}')
    run(repo, monkeypatch, root / 'README.md', '--root', root)
    text = (root / 'README.md').read_text()
    [accuracy, _, how] = rows(text, 'W4A4')
    assert accuracy[3:6] == ['29.4 ± 0.0 / 44.5 ± 0.0', '0.0 ± 0.0 / 0.0 ± 0.0', '22.5 ± 2.5 / 33.2 ± 0.0']
    assert how[-2:] == ['2, 11', 'one GPU']
    assert 'zsq.calibration_set.seed=2' in text and 'for the first seed' in text


def test_patterns_select_runs(repo: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, ap in ((1, 0.3), (2, 0.4), (13, 0.9)):
        keep(root, of_seed(seed, ap), f'default_w4a4_seed{seed}')
    keep(root, of_seed(1, 0.9), 'default_1024_w4a4_seed1')
    readme = root / 'README.md'
    readme.write_text(
        README.replace(
            'benchmarks/results/run',
            'benchmarks/results/run/default_w?a?_seed2 benchmarks/results/run/default_w?a?_seed1',
        )
    )
    run(repo, monkeypatch, readme, '--root', root)
    [accuracy, _, how] = rows(readme.read_text(), 'W4A4')
    assert accuracy[:2] == ['tiny', 'default'] and accuracy[5] == '35.0 ± 5.0 / 33.2 ± 0.0'
    assert how[-2] == '1, 2'
    # The name of another method is not that of a preset.
    readme.write_text(README.replace('benchmarks/results/run', 'benchmarks/results/run/default_1024_w*'))
    with pytest.raises(SystemExit, match='default_1024_w4a4_seed1.json holds .* rename it'):
        run(repo, monkeypatch, readme, '--root', root)
    # Each place has some.
    readme.write_text(
        README.replace(
            'benchmarks/results/run', 'benchmarks/results/run/default_w?a?_seed2 benchmarks/results/run/none_w*'
        )
    )
    with pytest.raises(SystemExit, match=r'no results in benchmarks/results/run/none_w\*'):
        run(repo, monkeypatch, readme, '--root', root)


@pytest.mark.parametrize(
    ('content', 'name', 'message'),
    [
        (of_seed(3, 0.2), 'tiny_w4a4_default_seed4', 'rename it'),
        (of_seed(7, 0.2), 'default_w4a4_seed7', r'two runs of .*tiny_w4a4.py with the same seed \(seeds: \[7, 7\]\)'),
        (dict(of_seed(3, 0.2), settings=dict(of_seed(3, 0.2)['settings'], train=dict(batch_size=9))), '', 'more than'),
    ],
)
def test_runs_of_a_row_differ_in_the_seed_only(
    repo: Path, root: Path, monkeypatch: pytest.MonkeyPatch, content: dict[str, Any], name: str, message: str
) -> None:
    keep(root, content, name or 'tiny_w4a4_default_seed3')
    with pytest.raises(SystemExit, match=message):
        run(repo, monkeypatch, root / 'README.md', '--root', root)


def test_missing_runs_are_empty_and_listed(written: str) -> None:
    empty = [''] * 5
    assert rows(written, 'W8A8') == [['tiny', preset, 'W8A8', *empty] for preset in ('default', 'paper')]
    assert 'Not run, therefore empty: tiny, default: W8A8; tiny, paper: W8A8, W4A4.' in written


def test_unmeasured_accuracy_is_empty(repo: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(root, dict(results(), metrics={}))
    run(repo, monkeypatch, root / 'README.md', '--root', root)
    [accuracy, *_] = rows((root / 'README.md').read_text(), 'W4A4')
    assert accuracy[3:] == ['', '', '', '7.53', '1.09']


def test_surrounding_text_is_kept_and_local_paths_are_left_out(written: str) -> None:
    assert written.startswith('Text before.\n') and written.endswith('\nText after.\n')
    assert 'old' not in written
    assert 'somebody' not in written and 'somewhere' not in written


def test_the_command_repeats_the_settings_of_the_run(written: str, root: Path) -> None:
    command = shlex.split(written.split('```bash\n')[1].split('```')[0].replace('\\\n', ' '))
    assert command[:3] == ['python', 'tools/train.py', 'configs/zsq/tiny_w4a4.py']
    assert command[3] == '--cfg-options'
    # A shell would expand it to file names.
    assert "zsq.synthesis.betas='[0.5,0.9]'" in written
    cfg = Config.fromfile(root / command[2])
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    cfg.merge_from_dict(parser.parse_args(command[3:]).cfg_options)
    section = json.loads(json.dumps(complete_section(cfg.zsq.to_dict())))
    recorded = copy.deepcopy(results())
    assert section.pop('quantizer') == recorded['quantizer']
    # The folder of the run is on its machine; the default is in the work_dir.
    assert section['calibration_set'].pop('dir') is None
    del recorded['settings']['calibration_set']['dir']
    assert section == recorded['settings']


def of_weight(weight: float) -> list[dict[str, Any]]:
    return [dict(type='mmzsq.BNStatisticsPrior', weight=1.0), dict(type='mmzsq.TotalVariationPrior', weight=weight)]


@pytest.mark.parametrize('in_leaf', [True, False])
def test_settings_in_lists_are_addressed_by_index(
    repo: Path, root: Path, monkeypatch: pytest.MonkeyPatch, in_leaf: bool
) -> None:
    content = results()
    if in_leaf:
        leaf = root / 'configs' / 'zsq' / 'tiny_w4a4.py'
        leaf.write_text(f'{leaf.read_text()}zsq["synthesis"] = dict(priors={of_weight(0.5)})\n')
        content['settings']['synthesis']['priors'] = of_weight(0.25)
    else:
        content['settings']['synthesis']['priors'][0]['weight'] = 0.25
    keep(root, content)
    if in_leaf:
        run(repo, monkeypatch, root / 'README.md', '--root', root)
        options = dict(
            word.split('=') for word in shlex.split((root / 'README.md').read_text()) if word.startswith('zsq.')
        )
        assert options['zsq.synthesis.priors.1.weight'] == '0.25'
        assert not any(key.startswith('zsq.synthesis.priors.0') for key in options)
        cfg = Config.fromfile(leaf)
        cfg.merge_from_dict({'zsq.synthesis.priors.1.weight': 0.25})
        assert cfg.zsq.synthesis.priors == of_weight(0.25)
    else:
        # A command line cannot address a list of a preset: the command writes a leaf with the whole list.
        run(repo, monkeypatch, root / 'README.md', '--root', root)
        page = (root / 'README.md').read_text()
        assert 'cat > work_dirs/leaf.py' in page and 'python tools/train.py work_dirs/leaf.py' in page
        assert "'weight': 0.25" in page


def test_printed_table_is_shown_with_times(repo: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = results(seconds=dict(train=48.3, evaluate_float=6.2))
    for stage, seconds in content['calibration_set']['stages'].items():
        content['calibration_set']['stages'][stage]['seconds'] = 30.4 if seconds['iterations'] == 4 else 100.0
    keep(root, content)
    (root / 'README.md').write_text(
        '<!-- printed by benchmarks/results/run/tiny_w4a4_default.json -->\nold\n<!-- end of print -->\n'
    )
    run(repo, monkeypatch, root / 'README.md', '--root', root)
    text = (root / 'README.md').read_text()
    assert 'one GPU: relabel 30 s, synthesize 100 s, train 48 s, evaluate_float 6 s.' in text
    [teacher] = [line for line in text.splitlines() if 'teacher' in line]
    assert [cell.strip() for cell in teacher.split('│')[2:-1]] == ['0.294', '0.445', '7.53']
    run(repo, monkeypatch, root / 'README.md', '--root', root, '--check')


def test_check_reports_a_stale_file_without_writing(
    repo: Path, root: Path, written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = (root / 'README.md', '--check', '--root', root)
    run(repo, monkeypatch, *check)
    stale = written.replace('29.4', '29.5')
    (root / 'README.md').write_text(stale)
    with pytest.raises(SystemExit) as stopped:
        run(repo, monkeypatch, *check)
    assert stopped.value.code == 1
    assert (root / 'README.md').read_text() == stale


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(config='configs/zsq/other_w4a4.py'), 'other_w4a4.py is not a config'),
        (dict(preset='paper'), 'under the preset paper with seed 7: rename it'),
        (dict(settings=dict(synthesis=dict(priors=[dict(type='A')]))), 'zsq.synthesis.priors differs'),
    ],
)
def test_a_mistake_is_one_message(
    repo: Path, root: Path, monkeypatch: pytest.MonkeyPatch, change: dict, message: str
) -> None:
    content = results()
    content.update(change)
    content['settings'] = {**results()['settings'], **change.get('settings', {})}
    keep(root, content)
    with pytest.raises(SystemExit, match=f'^error: .*{message}'):
        run(repo, monkeypatch, root / 'README.md', '--root', root)
    assert (root / 'README.md').read_text() == README


def test_a_file_without_markers_is_refused(repo: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / 'README.md').write_text('no table')
    with pytest.raises(SystemExit, match='^error: no table to write'):
        run(repo, monkeypatch, root / 'README.md', '--root', root)


def test_the_tables_of_this_repository_are_up_to_date(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(repo, monkeypatch, repo / 'configs' / 'zsq' / 'README.md', '--check')
    run(repo, monkeypatch, repo / 'README.md', '--check')


def test_model_index_lists_every_leaf_with_measured_results(repo: Path) -> None:
    [imported] = yaml.safe_load((repo / 'model-index.yml').read_text())['Import']
    index = yaml.safe_load((repo / imported).read_text())
    leaves = {path.stem for path in (repo / 'configs' / 'zsq').glob('*.py')}
    assert sorted(model['Name'] for model in index['Models']) == sorted(leaves)
    kept = {path.stem: json.loads(path.read_text()) for path in (repo / 'benchmarks' / 'results').rglob('*.json')}
    [collection] = index['Collections']
    assert (repo / collection['README']).is_file()
    for model in index['Models']:
        assert model['In Collection'] == collection['Name']
        assert model['Config'] == f'configs/zsq/{model["Name"]}.py'
        if 'Results' not in model:
            continue
        bits = model['Name'].rpartition('_')[2]
        named = [f'{model["Name"]}_default', *([f'default_{bits}_seed'] if model['Name'] == f'yolov5-n_{bits}' else [])]
        runs = [found for name, found in kept.items() if name.startswith(tuple(named))]
        assert {found['config'] for found in runs} == {model['Config']}
        run_of_model, *_ = runs
        [result] = model['Results']
        metrics = [found['metrics']['zero_shot'] for found in runs]
        assert result['Metrics'] == {
            'box AP': pytest.approx(statistics.mean(100 * found['coco/bbox_mAP'] for found in metrics)),
            'box AP50': pytest.approx(statistics.mean(100 * found['coco/bbox_mAP_50'] for found in metrics)),
        }
        assert model['Metadata'] == {
            'Epochs': run_of_model['settings']['train']['max_epochs'],
            'Synthetic Images': run_of_model['calibration_set']['statistics']['images'],
            'Model Size (MB)': pytest.approx(run_of_model['model_mb']['quantized'], abs=0.005),
        }


def test_kept_results_hold_no_local_paths(repo: Path) -> None:
    for path in (repo / 'benchmarks' / 'results').rglob('*.json'):
        assert '"/' not in path.read_text(), path


def test_a_removed_setting_counts_only_if_a_run_had_it_switched_on() -> None:
    recorded = dict(train=dict(lr=1, drop=None, relative=False, extra=True))
    assert dict(differences(recorded, dict(train=dict(lr=1)), 'zsq')) == {'zsq.train.extra': True}
    # In a section of another type every setting counts.
    recorded = dict(type='A', warmup=0)
    assert dict(differences(recorded, dict(type='B'), 'zsq')) == {'zsq.type': 'A', 'zsq.warmup': 0}
