# SPDX-License-Identifier: Apache-2.0
"""The comparison of sources makes each set once, trains on it, and shows every result in its cell."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import sources
from mmengine.config import Config


def jobs(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[sources.Job]:
    monkeypatch.setattr(sys, 'argv', ['sources.py', *arguments])
    return list(sources.plan(sources._parse_args()))


def test_students_of_a_source_and_seed_share_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = jobs(
        monkeypatch,
        *('leaf.py', '--name', 'n', '--sources', 'mixed', 'procedural', '--bits', 'w8a8', 'w4a4', '--seeds', '0', '1'),
        *('--work-dir', str(tmp_path)),
    )
    made = {job.name: job for job in planned if not job.needs}
    students = [job for job in planned if job.needs]
    assert len(made) == 4
    assert len(students) == 8
    for job in students:
        (of_set,) = job.needs
        options = dict(option.split('=') for option in job.command[job.command.index('--cfg-options') + 1 :])
        given = dict(
            option.split('=') for option in made[of_set].command[made[of_set].command.index('--cfg-options') + 1 :]
        )
        assert given.items() <= options.items()
        assert given['zsq.calibration_set.source'] in job.name
        assert given['zsq.calibration_set.seed'] == job.name[-1]
        bits = options['zsq.quantizer.w_bits'], options['zsq.quantizer.a_bits']
        assert f'w{bits[0]}a{bits[1]}' in job.name


def test_real_images_replace_those_of_the_evaluation(tmp_path: Path) -> None:
    leaf = tmp_path / 'leaf.py'
    leaf.write_text("val_dataloader = dict(dataset=dict(type='CocoDataset', data_root='d/', ann_file='val.json'))\n")
    config = Config.fromfile(sources.with_real_images(leaf, (str(tmp_path / 'a.json'), str(tmp_path / 'i')), tmp_path))
    real = config.zsq.calibration_set.real
    assert (real.type, real.ann_file, real.data_root) == ('CocoDataset', str(tmp_path / 'a.json'), '')
    assert real.data_prefix.img == str(tmp_path / 'i')
    assert not real.test_mode


def test_a_cell_holds_the_mean_of_its_seeds(tmp_path: Path) -> None:
    for seed, ap in enumerate((0.10, 0.12)):
        result = dict(
            metrics={
                row: {'coco/bbox_mAP': ap + extra} for row, extra in (('float', 0.2), ('ptq', 0), ('zero_shot', 0.1))
            },
            evaluation_images=200,
            train=dict(iterations=640),
            seconds=dict(train=30.0),
            device='a device',
            images=512,
            batch_size=16,
            weight_size=0.04,
        )
        (tmp_path / f'yolo-fastest_mixed_w4a8_seed{seed}.json').write_text(json.dumps(result))
    page = sources.with_table(f'before\n{sources.BEGIN}\n{sources.END}\nafter', sources.read_runs(tmp_path))
    assert '| 512 half of each, QAT |  |  |  | 21.0 ± 1.0 |  | 2 | 30 |' in page
    assert '| 512 half of each, PTQ |  |  |  | 11.0 ± 1.0 |  | 2 |  |' in page
    assert page.startswith('before\n') and page.endswith('\nafter')


def test_a_cell_with_another_rule_of_the_learning_rate_is_marked(tmp_path: Path) -> None:
    for bits, size in (('w8a8', None), ('w6a6', 0.04), ('w4a8', None)):
        result = dict(
            metrics={row: {'coco/bbox_mAP': 0.1} for row in ('float', 'ptq', 'zero_shot')},
            evaluation_images=200,
            train=dict(iterations=640),
            seconds=dict(train=30.0),
            device='a device',
            images=512,
            batch_size=16,
            weight_size=size,
        )
        (tmp_path / f'yolo-fastest_mixed_{bits}_seed0.json').write_text(json.dumps(result))
    page = sources.with_table(f'{sources.BEGIN}\n{sources.END}', sources.read_runs(tmp_path))
    assert '| 512 half of each, QAT | 10.0 | 10.0 |  | 10.0 * |  | 1 | 30 |' in page
    assert '| 512 half of each, PTQ | 10.0 | 10.0 |  | 10.0 |  | 1 |  |' in page
    assert sources.OTHER_RATE in page


def test_the_page_is_up_to_date() -> None:
    page = sources.PAGE.read_text()
    assert sources.with_table(page, sources.read_runs(sources.RESULTS)) == page
