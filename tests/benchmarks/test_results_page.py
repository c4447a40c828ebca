# SPDX-License-Identifier: Apache-2.0
"""Tests of benchmarks/results_page.py: numbers match the runs; missing and changed runs are listed."""

from __future__ import annotations

import copy
import json
import re
import runpy
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import results_page
import yolo
from mmengine.config import Config, DictAction
from yolo_methods import METHODS
from yolo_tables import TABLES

from mmzsq.config.compose import complete_section
from mmzsq.errors import UserError

TOOL = 'benchmarks/results_page.py'
SETTINGS = ('calibration_set', 'label_sampler', 'synthesis', 'distillation', 'train')


@pytest.fixture
def root(repo: Path, tmp_path: Path) -> Path:
    """A repository with the configs of this one and no results."""
    (tmp_path / 'configs').symlink_to(repo / 'configs')
    (tmp_path / results_page.RESULTS).mkdir(parents=True)
    return tmp_path


@cache
def section_of(repo: Path, method: str, bits: str, seed: int) -> dict[str, Any]:
    """The settings that the tool's command line produces, in JSON types."""
    run = yolo.Run(method, bits, seed, ())
    with tempfile.TemporaryDirectory() as folder:
        yolo.write_configs([run], Path(folder))
        command = yolo.student_command(run, Path(folder), ())
        cfg = Config.fromfile(repo / command[1])
    options = (option.split('=', 1) for option in command[command.index('--cfg-options') + 1 :])
    cfg.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in options})
    return json.loads(json.dumps(dict(complete_section(cfg.zsq.to_dict()), config=METHODS[method].config_for(bits)[0])))


@pytest.fixture
def keep(repo: Path, root: Path) -> Callable[..., dict[str, Any]]:
    """Keep a result with an AP of ``ap`` per mill, as yolo.py does."""

    def keep(name: str, ap: int, ptq: int | None = 100, **changes: Any) -> Any:
        match = results_page.NAME.fullmatch(name)
        assert match is not None
        section = copy.deepcopy(section_of(repo, match['method'], match['bits'], int(match['seed'])))
        real = section['calibration_set']['real'] is not None
        statistics = dict(images=337, real=True) if real else dict(images=512, boxes_per_image=dict(mean=2.5))
        stage = dict(image_size=[640, 640], iterations=400, seconds=120.0)
        rows = dict(float=300, **({} if ptq is None else dict(ptq=ptq)), zero_shot=ap)
        content = dict(
            config='/home/somebody/mmzsq/' + section['config'],
            preset=section['preset'],
            quantizer=section['quantizer'],
            metrics={
                row: {'coco/bbox_mAP': value / 1000, 'coco/bbox_mAP_50': 2 * value / 1000}
                for row, value in rows.items()
            },
            evaluation_images=200,
            model_mb=dict(float=7.5, quantized=1.1),
            calibration_set=dict(statistics=statistics, stages={} if real else dict(synthesize=stage)),
            settings={key: section[key] for key in SETTINGS},
            train=dict(iterations=640),
            seconds=dict(train=60.0, evaluate_float=30.0),
            device='one GPU',
        )
        content |= changes
        path = root / results_page.RESULTS / f'{name}.json'
        path.write_text(json.dumps(content))
        return content

    return keep


def section(root: Path, number: int) -> str:
    """The part of the page with one table."""
    return results_page.render_table(TABLES[number], results_page.read_runs(root))


def row(text: str, *labels: str) -> list[str]:
    """The cells after ``labels`` in the first row that begins with them."""
    lines = [[cell.strip() for cell in line[1:-1].split('|')] for line in text.splitlines() if line[:1] == '|']
    return next(line[len(labels) :] for line in lines if tuple(line[: len(labels)]) == labels)


def test_a_cell_is_the_mean_over_the_seeds_with_half_their_range(
    root: Path, keep: Callable[..., dict[str, Any]]
) -> None:
    for seed, ap in enumerate((200, 210, 220)):
        keep(f'default_w4a4_seed{seed}', ap)
    keep('paper_w4a4_seed0', 50)
    text = section(root, 2)
    default = row(text, 'W4A4', '`default`, zero-shot')
    assert default == ['512 synthetic', '21.0 ± 1.0 / 42.0 ± 2.0', '70.0 %', '']
    # One seed has no spread. The paper's number is in the same row.
    assert row(text, 'W4A4', '`paper`, zero-shot')[1:] == ['5.0 / 10.0', '16.7 %', '15.0 / 27.0']
    # The same runs in other tables.
    assert row(section(root, 5), 'W4A4', 'adaptive sampling')[2:4] == ['5.0 / 10.0', '21.0 ± 1.0 / 42.0 ± 2.0']
    assert row(section(root, 7), '`default`', '512')[0] == '21.0 ± 1.0 / 42.0 ± 2.0'
    assert row(section(root, 4), 'W4A4', '`default`, PTQ only', 'synthetic')[0] == '10.0 ± 0.0 / 20.0 ± 0.0'


def test_settings_of_runs_are_listed_below_a_table(root: Path, keep: Callable[..., dict[str, Any]]) -> None:
    keep('default_w4a4_seed0', 200)
    keep('default_w8a8_seed2', 200)
    keep('paper_lsq-real337_w4a4_seed0', 114)
    text = section(root, 2)
    assert 'python benchmarks/yolo.py --tables 2 --seeds 0 2\n' in text
    assert row(text, '`default`') == [
        *('W8A8, W4A4', '512 synthetic', '2.5', '640 px x 400', '640 x 16', '0, 2', '2.0', '1.5', '200 images'),
        'one GPU',
    ]
    # Runs on real images have no set.
    assert row(text, '`paper_lsq-real337`')[:4] == ['W4A4', '337 real', '', '']
    assert row(text, '`paper_lsq-real337`')[6] == ''
    assert 'somebody' not in text and 'have changed since' not in text


def test_missing_runs_are_empty_and_listed(root: Path, keep: Callable[..., dict[str, Any]]) -> None:
    assert 'No run yet: all of our columns are empty.' in section(root, 5)
    keep('default_tile-in_w4a4_seed0', 90)
    text = section(root, 5)
    assert 'Nothing' not in text
    [missing] = [line for line in text.splitlines() if line.startswith('Not run, therefore empty: ')]
    assert '`paper_tile-in`,' in missing and '`default_tile-in` (W6A6, W5A5),' in missing
    assert row(text, 'W4A4', 'Tile, in distribution', 'no', 'yes') == ['', '9.0 / 18.0', '6.8 / 13.4']
    # Complete tables have no such line.
    for method, bits in TABLES[8].runs:
        keep(f'{method}_{bits}_seed0', 100)
    assert 'Not run' not in section(root, 8)


def test_unevaluated_is_empty_and_nothing_detected_is_zero(root: Path, keep: Callable[..., dict[str, Any]]) -> None:
    keep('default_w4a4_seed0', 200, ptq=None)
    metrics = {'float': {'coco/bbox_mAP': 0.3}, 'ptq': {}, 'zero_shot': {}}
    keep('paper_noise_w4a4_seed0', 0, metrics=metrics)
    assert row(section(root, 4), 'W4A4', '`default`, PTQ only', 'synthetic')[0] == ''
    assert row(section(root, 5), 'W4A4', 'Gaussian noise', 'no', 'no')[0] == '0.0 / 0.0'


def test_runs_with_changed_settings_are_listed(root: Path, keep: Callable[..., dict[str, Any]]) -> None:
    content = keep('default_w4a4_seed0', 200)
    settings = copy.deepcopy(content['settings'])
    settings['train']['max_epochs'] = 7
    settings['train']['num_workers'] = 9
    settings['calibration_set']['dir'] = '/mnt/scratch'
    del settings['train']['augmentation'], settings['train']['amp']
    keep('default_w4a4_seed0', 200, settings=settings)
    text = section(root, 8)
    # New settings that are off change nothing, and neither does the folder of the set.
    assert 'Marked *, run' in text and '`default`: `zsq.train.max_epochs=7, zsq.train.augmentation=absent`.' in text
    assert row(text, '`default`', 'yes', 'yes', '')[0] == '20.0 / 40.0 *'
    keep('default_w4a4_seed1', 200)
    with pytest.raises(UserError, match='runs of default at w4a4 differ in more than the seed'):
        section(root, 8)
    (root / 'benchmarks/results/yolov5-n/default_w4a4_seed1.json').unlink()
    settings['train']['max_epochs'] = content['settings']['train']['max_epochs']
    keep('default_w4a4_seed0', 200, settings=settings)
    # Settings that were added later do not count as changed.
    text = section(root, 8)
    assert '\nRun with settings that have changed since: `default`: `zsq.train.augmentation=absent`.' in text
    assert row(text, '`default`', 'yes', 'yes', '')[0] == '20.0 / 40.0'


def test_synthesis_settings_are_ignored_for_real_images(root: Path, keep: Callable[..., dict[str, Any]]) -> None:
    settings = copy.deepcopy(keep('default_real337_w4a4_seed0', 200)['settings'])
    settings['synthesis']['lr'] = 9.0
    keep('default_real337_w4a4_seed0', 200, settings=settings)
    assert 'have changed since' not in section(root, 2)


@pytest.mark.parametrize(
    ('name', 'changes', 'message'),
    [
        ('default_w4a4_seed0', dict(quantizer=dict(w_bits=4, a_bits=8)), 'at w4a8, not .* at w4a4'),
        ('default_w4a4_seed0', dict(config='configs/zsq/yolov5-n_w8a8.py'), 'holds configs/zsq/yolov5-n_w8a8.py'),
        ('default_w4a4_seed0', dict(config='/elsewhere/own.py'), 'own.py is not a config'),
        ('default_w4a4_seed1', dict(metrics={'float': {'coco/bbox_mAP': 0.35}}), 'different teachers'),
    ],
)
def test_results_of_something_else_are_refused(
    root: Path, keep: Callable[..., dict[str, Any]], name: str, changes: dict[str, Any], message: str
) -> None:
    keep('paper_w4a4_seed0', 100)
    keep(name, 100, **changes)
    with pytest.raises(UserError, match=message):
        results_page.read_runs(root)


def test_a_file_is_named_after_a_method_and_its_seed(root: Path, keep: Callable[..., dict[str, Any]]) -> None:
    keep('default_w4a4_seed0', 100)
    path = root / results_page.RESULTS / 'default_w4a4_seed0.json'
    path.rename(path.with_stem('default_w4a4_seed3'))
    with pytest.raises(UserError, match='seed 0: rename it'):
        results_page.read_runs(root)
    path.with_stem('default_w4a4_seed3').rename(path.with_stem('fancy_w4a4_seed0'))
    with pytest.raises(UserError, match='is not named METHOD_BITS_seedSEED.json'):
        results_page.read_runs(root)


def run(repo: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> None:
    monkeypatch.setattr(sys, 'argv', [TOOL, *map(str, arguments)])
    runpy.run_path(str(repo / TOOL), run_name='__main__')


def test_the_page_is_written_and_checked(
    repo: Path, root: Path, keep: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    keep('default_w4a4_seed0', 200)
    with pytest.raises(SystemExit) as stale:
        run(repo, monkeypatch, '--root', root, '--check')
    assert stale.value.code == 1 and not (root / 'docs').exists()
    run(repo, monkeypatch, '--root', root)
    text = (root / 'docs/results.md').read_text()
    assert [line for line in text.splitlines() if line.startswith('## ')] == [
        f'## Table {number}: {TABLES[number].title}' for number in (2, 4, 5, 6, 7, 8, 9, 10)
    ]
    run(repo, monkeypatch, '--root', root, '--check')
    keep('default_w4a4_seed0', 210)
    with pytest.raises(SystemExit):
        run(repo, monkeypatch, '--root', root, '--check')


def test_labels_of_sets_are_compared_with_real_labels(
    repo: Path, root: Path, keep: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def numbers(images: int, boxes: float, small: float, **correlation: float) -> dict[str, Any]:
        sizes = dict(small=small, medium=0.25, large=0.75 - small)
        return dict(images=images, boxes_per_image=dict(mean=boxes), box_sizes=sizes, correlation=correlation)

    keep('default_w4a4_seed0', 200)
    measured = dict(
        annotations=dict(numbers(337, 8.34, 0.34), correlation={}),
        sets={'default_prior': numbers(512, 8.24, 0.5, pearson=0.945, spearman=0.601), 'mine': numbers(4, 1, 0)},
    )
    (root / results_page.LABELS).write_text(json.dumps(measured))
    run(repo, monkeypatch, '--root', root)
    text = (root / 'docs/results.md').read_text()
    ours = "adaptive sampling from the detector's prior (ours)"
    labels = text[text.index('## Labels') :]
    assert row(labels, ours) == ['512', '8.2', '50 %', '25 %', '25 %', '0.94', '0.60']
    assert row(labels, '`mine`') == ['4', '1.0', '0 %', '25 %', '75 %', '', '']
    assert row(labels, 'real, train2017') == ['337', '8.3', '34 %', '25 %', '41 %', '', '']
    assert 'mine=work_dirs/yolov5-n/set_mine_seed0/calibration_set' in labels
    for image in re.findall(r'\]\((images/[^)]*)\)', labels):
        assert (repo / 'docs' / image).is_file()


def test_numbers_of_the_page_match_the_kept_runs(repo: Path) -> None:
    def tables(text: str) -> list[str]:
        return [line for line in text.splitlines() if line[:1] == '|']

    page = (repo / results_page.PAGE).read_text(encoding='utf-8')
    extras = results_page.read_labels(repo), results_page.read_scores(repo), results_page.read_reconstructions(repo)
    assert tables(page) == tables(results_page.render(results_page.read_runs(repo), *extras))


def test_the_summary_of_other_pages_is_that_of_the_page(
    root: Path, keep: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = [root / name for name in results_page.SUMMARY_PAGES]
    for page in pages:
        page.parent.mkdir(exist_ok=True)
        page.write_text(f'before\n<!-- summary of {results_page.RESULTS} -->\n<!-- end of summary -->\nafter\n')
    keep('default_w4a8_seed0', 210, ptq=90)
    keep('default_w4a8_seed1', 230, ptq=110)
    keep('default_w8a8_seed0', 290, ptq=288)
    keep('default_mixed-size_w4a8_seed0', 250)
    keep('default_real337_w8a8_seed0', 295)
    monkeypatch.setattr(sys, 'argv', [TOOL, '--root', str(root)])
    results_page.main()
    text, other = (page.read_text() for page in pages)
    assert text == other
    assert text.startswith('before\n') and text.endswith('<!-- end of summary -->\nafter\n')
    cells = [[cell.strip() for cell in line.split('|')[2:-1]] for line in text.splitlines() if line.startswith('|')]
    head, _, full, ptq, zero_shot, mixed, real = cells
    assert head == ['W8A8', 'W6A6', 'W5A5', 'W4A8', 'W4A4']
    assert full == ['30.0', '', '', '30.0', '']
    assert ptq == ['28.8', '', '', '10.0', '']
    assert zero_shot == ['29.0', '', '', '22.0', '']
    assert mixed == ['', '', '', '25.0', ''] and real == ['29.5', *[''] * 4]
    # The check of the page covers them.
    monkeypatch.setattr(sys, 'argv', [TOOL, '--root', str(root), '--check'])
    results_page.main()
    for page in pages:
        page.write_text(text.replace('22.0', '23.0'))
        with pytest.raises(SystemExit):
            results_page.main()
        assert f'{page.name} is not up to date' in capsys.readouterr().err
        page.write_text(text)
