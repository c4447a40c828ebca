# SPDX-License-Identifier: Apache-2.0
"""Class names are compared by name, as MMDetection itself maps labels to categories."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from mmdet.registry import DATASETS
from mmdet.utils import register_all_modules

from mmzsq.class_names import (
    check_built_dataset,
    check_data,
    check_dataset,
    checkpoint_classes,
    choose_classes,
    declared_classes,
    read_classes,
)
from mmzsq.errors import UserError

NAMES = ['disc', 'ring', 'bar']
WriteFile = Callable[..., str]


@pytest.fixture(autouse=True)
def _registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_all_modules()
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write() -> WriteFile:
    """Function that writes a COCO file whose categories have the given names, and ids in steps of 10 by default."""

    def write(names: Sequence[str], ids: Sequence[int] | None = None, file: str = 'instances.json') -> str:
        ids = ids or range(10, 10 * len(names) + 10, 10)
        content = dict(
            categories=[dict(id=index, name=name) for index, name in zip(ids, names, strict=True)],
            images=[dict(id=1, file_name='a.png', width=64, height=64)],
            annotations=[
                dict(id=index, image_id=1, category_id=ids[0], bbox=[1, 2, 30, 40], area=1200, iscrowd=0)
                for index in range(1, 2)
            ],
        )
        Path(file).write_text(json.dumps(content))
        return file

    return write


def data(file: str | None = 'instances.json', kind: str = 'CocoDataset', **evaluator: Any) -> dict[str, Any]:
    dataset = dict(type=kind, ann_file=file, metainfo=dict(classes=NAMES), data_prefix=dict(img=''), test_mode=True)
    return dict(val_dataloader=dict(dataset=dataset), val_evaluator=dict(type='CocoMetric', **evaluator))


# Files of a config.


def test_the_same_order_passes_and_further_categories_are_dropped(write: WriteFile) -> None:
    write(['other', 'disc', 'ring', 'more', 'bar'])
    check_data(data(ann_file='instances.json'), 'val')
    built = DATASETS.build(data()['val_dataloader']['dataset'])
    assert built.cat_ids == [20, 30, 50]
    check_built_dataset(built, NAMES, 'val')


@pytest.mark.parametrize(
    ('names', 'message'),
    [
        (['ring', 'disc', 'bar'], r"class 0 is 'disc' in the config .* and 'ring' in categories of instances\.json"),
        (['disc', 'bar', 'ring'], "class 1 is 'ring' .* and 'bar' in"),
        (['disc', 'bar'], r"class 1 of the config .*, 'ring', is not in instances\.json"),
        (['disc', 'ring', 'Bar'], "class 2 .*'bar', is not in"),
        (['disc', 'ring', 'bar', 'disc'], r'nothing in the config .* \(3 and 4 classes\)'),
    ],
)
def test_other_categories_are_refused_before_and_after_building(
    write: WriteFile, names: Sequence[str], message: str
) -> None:
    write(names)
    with pytest.raises(UserError, match=rf'{message}.*order.*disc, ring, bar.*metainfo\.classes'):
        check_data(data(), 'val')
    built = DATASETS.build(data()['val_dataloader']['dataset'])
    with pytest.raises(UserError, match=message.replace('the config .*', '.*')):
        check_built_dataset(built, NAMES, 'val')


@pytest.mark.parametrize('wrapper', ['RepeatDataset', 'ClassBalancedDataset', 'ConcatDataset', 'both'])
def test_wrapped_data_sets_are_compared(write: WriteFile, wrapper: str) -> None:
    write(NAMES)
    write(NAMES[::-1], file='reversed.json')
    good, bad = (data(file)['val_dataloader']['dataset'] for file in ('instances.json', 'reversed.json'))
    dataset = dict(type='ConcatDataset', datasets=[good, bad])
    if wrapper == 'both':
        dataset = dict(type='RepeatDataset', times=1, dataset=dataset)
    elif wrapper != 'ConcatDataset':
        dataset = dict(type=wrapper, dataset=bad)
    with pytest.raises(UserError, match=r'reversed\.json'):
        check_dataset(dataset, 'val_dataloader.dataset')


def test_data_sets_of_different_classes_are_refused() -> None:
    first, second = (data(None)['val_dataloader']['dataset'] for _ in range(2))
    second['metainfo'] = dict(classes=NAMES[::-1])
    with pytest.raises(UserError, match="class 0 is 'disc' in the first data set .* 'bar' in another"):
        check_dataset(dict(type='ConcatDataset', datasets=[first, second]), 'val_dataloader.dataset')


def test_the_file_of_the_metric_is_compared(write: WriteFile) -> None:
    write(NAMES)
    write(NAMES[::-1], file='other.json')
    check_data(data(ann_file='missing.json'), 'val')
    with pytest.raises(UserError, match=r'val_evaluator.*other\.json'):
        check_data(data(ann_file='other.json'), 'val')
    several = dict(data(), val_evaluator=[dict(type='CocoMetric'), dict(type='CocoMetric', ann_file='other.json')])
    with pytest.raises(UserError, match=r'other\.json'):
        check_data(several, 'val')
    # The metric sorts by id: 10, 20, 30.
    write(NAMES[::-1], [30, 20, 10], file='other.json')
    check_data(data(ann_file='other.json', sort_categories=True), 'val')


def test_objects365_sorts_categories_by_their_ids(write: WriteFile) -> None:
    write(['bar', 'disc', 'ring'], [3, 1, 2])
    check_data(data(kind='Objects365V1Dataset'), 'val')
    built = DATASETS.build(data(kind='Objects365V1Dataset')['val_dataloader']['dataset'])
    assert built.cat_ids == [1, 2, 3]
    check_built_dataset(built, NAMES, 'val')
    write(['disc', 'ring', 'bar'], [3, 1, 2])
    with pytest.raises(UserError, match="class 0 is 'disc' .* and 'ring' in"):
        check_data(data(kind='Objects365V1Dataset'), 'val')


def test_lvis_takes_categories_by_position(write: WriteFile) -> None:
    cfg = data(kind='LVISV1Dataset')
    cfg['val_evaluator'] = dict(type='LVISMetric', ann_file='instances.json')
    write(['disc', 'ring', 'bar_(pole)'])
    check_data(cfg, 'val')
    for names in (['ring', 'disc', 'bar'], ['disc', 'ring'], ['disc', 'ring', 'bar', 'more']):
        write(names)
        with pytest.raises(UserError, match='class names differ|is not in'):
            check_data(cfg, 'val')


def test_paths_are_joined_as_by_mmengine(write: WriteFile, tmp_path: Path) -> None:
    (tmp_path / 'root').mkdir()
    write(NAMES[::-1], file='root/instances.json')
    cfg = data()
    check_data(cfg, 'val')
    cfg['val_dataloader']['dataset']['data_root'] = 'root/'
    with pytest.raises(UserError, match=r'root/instances\.json'):
        check_data(cfg, 'val')


@pytest.mark.parametrize('content', ['{', '[]', '{}', '{"categories": [1]}', '{"categories": [{"id": 1}]}', '\0'])
def test_a_damaged_file_is_named(content: str) -> None:
    Path('instances.json').write_text(content)
    with pytest.raises(UserError, match=r'instances\.json cannot be read as COCO annotations'):
        check_data(data(), 'val')


def test_files_that_are_not_here_and_other_formats_pass() -> None:
    check_data(data('nowhere.json'), 'val')
    check_data(dict(val_dataloader=dict(dataset=dict(type='VOCDataset', ann_file='ImageSets/Main/test.txt'))), 'val')
    check_data(dict(val_dataloader=None, val_evaluator=None), 'val')


def test_the_names_of_a_built_data_set_are_those_of_the_detector(write: WriteFile) -> None:
    write(NAMES)
    built = DATASETS.build(data()['val_dataloader']['dataset'])
    with pytest.raises(UserError, match="class 0 is 'a' in the detector and 'disc' in val"):
        check_built_dataset(built, ['a', 'b', 'c'], 'val')


# Names of configs and checkpoints.


def test_names_are_read_as_by_mmengine(write: WriteFile) -> None:
    Path('names.txt').write_text('disc\nring\nbar\n')
    dataset = dict(data(write(NAMES))['val_dataloader']['dataset'], metainfo=dict(classes='names.txt'))
    assert declared_classes(dict(val_dataloader=dict(dataset=dataset))) == NAMES
    assert list(DATASETS.build(dataset).metainfo['classes']) == NAMES
    assert read_classes('person', 'metainfo.classes') == ['person']
    assert read_classes((), 'metainfo.classes') is None
    for wrong in ('missing.txt', 'folder/missing', 5, [1, 2], {'a': 1}, '.'):
        with pytest.raises(UserError, match='metainfo.classes is'):
            read_classes(wrong, 'metainfo.classes')


@pytest.mark.parametrize(
    'meta',
    [
        dict(CLASSES=('a', 'b')),
        dict(dataset_meta=dict(CLASSES=['a', 'b'])),
        dict(dataset_meta=dict(classes=('a', 'b')), CLASSES=('c',)),
    ],
)
def test_names_of_all_versions_of_mmdetection_are_read(meta: dict[str, Any]) -> None:
    assert checkpoint_classes(meta) == ['a', 'b']


@pytest.mark.parametrize('meta', [{}, dict(dataset_meta=None), dict(dataset_meta=[1], CLASSES=7), dict(CLASSES=[None])])
def test_odd_meta_has_no_names(meta: dict[str, Any]) -> None:
    assert checkpoint_classes(meta) is None


def test_config_and_checkpoint_must_agree() -> None:
    def choose(declared: Any, trained: Any, count: int | None = 3) -> Any:
        return choose_classes(declared, dict(dataset_meta=dict(classes=trained)), count, 'teacher.pth')

    assert choose(NAMES, NAMES) == choose(None, NAMES) == choose(NAMES, None) == NAMES
    assert choose(['traffic light', 'b'], ['Traffic_Light', 'B'], 2) == ['traffic light', 'b']
    assert choose(None, None) is None
    # MMDetection saves COCO's names where a config names no classes.
    assert choose(NAMES, [f'coco {index}' for index in range(80)]) == NAMES
    for other in (NAMES[::-1], ['disc', 'ring', 'rod']):
        with pytest.raises(UserError, match=rf'class \d is .* in the checkpoint teacher\.pth.*order: {other[0]}, '):
            choose(NAMES, other)
    with pytest.raises(UserError, match=r'class 2 is \'bar\' in the config and nothing in .*\(3 and 2 classes\)'):
        choose(NAMES, NAMES[:2], None)
