# SPDX-License-Identifier: Apache-2.0
"""Tests of tools/dataset_converters/voc_to_coco.py: objects match those that MMDetection reads from XML."""

from __future__ import annotations

import json
import math
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mmdet.datasets import CocoDataset, XMLDataset
from pycocotools import mask as coco_mask

TOOL = 'tools/dataset_converters/voc_to_coco.py'
CLASSES = ('RBC', 'WBC', 'Platelets')
OBJECT = (
    '<object><name>{name}</name><difficult>{difficult}</difficult>'
    '<bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>'
)
Convert = Callable[..., Path]


@pytest.fixture
def convert(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """Run the tool on a data set; returns the folder of the JSON files."""

    def convert(root: Path, splits: list[str], *options: str, classes: tuple[str, ...] = CLASSES) -> Path:
        out = tmp_path / 'out'
        arguments = [str(root), '--splits', *splits, '--classes', *classes, '--out', str(out), *options]
        monkeypatch.setattr(sys, 'argv', [TOOL, *arguments])
        runpy.run_path(str(repo / TOOL), run_name='__main__')
        return out

    return convert


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Two images: one with an object, a difficult one and one without area; and one without any."""
    objects = [
        OBJECT.format(name='RBC', difficult=0, x1=11, y1=21, x2=51, y2=41),
        OBJECT.format(name='WBC', difficult=1, x1=1, y1=1, x2=31, y2=31),
        OBJECT.format(name='RBC', difficult=0, x1=9, y1=9, x2=9, y2=30),
    ]
    root = tmp_path / 'voc'
    (root / 'Annotations').mkdir(parents=True)
    for name, content in (('a', ''.join(objects)), ('b', '')):
        size = '<size><width>64</width><height>48</height></size>'
        (root / 'Annotations' / f'{name}.xml').write_text(f'<annotation>{size}{content}</annotation>')
    (root / 'ImageSets' / 'Main').mkdir(parents=True)
    (root / 'ImageSets' / 'Main' / 'test.txt').write_text('a\nb\n')
    return root


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def instances(dataset: Any) -> dict[str, tuple[tuple[int, int], list[tuple[list[float], int, int]]]]:
    """By image: its size, and box in xyxy, label and whether it is ignored of each object."""
    return {
        Path(info['img_path']).stem: (
            (info['width'], info['height']),
            [([float(v) for v in i['bbox']], i['bbox_label'], i['ignore_flag']) for i in info['instances']],
        )
        for info in map(dataset.get_data_info, range(len(dataset)))
    }


@pytest.mark.parametrize(('split', 'images'), [('trainval', 292), ('test', 72)])
def test_real_objects_are_those_that_mmdet_reads(shared: Path, convert: Convert, split: str, images: int) -> None:
    root = shared / 'data' / 'bccd'
    out = convert(root, [split])
    common = dict(metainfo=dict(classes=CLASSES), pipeline=[], test_mode=True)
    ours = instances(CocoDataset(data_prefix=dict(img='JPEGImages/'), ann_file=str(out / f'{split}.json'), **common))
    theirs = instances(
        XMLDataset(
            ann_file=str(root / 'ImageSets' / 'Main' / f'{split}.txt'),
            data_prefix=dict(sub_data_root=str(root)),
            **common,
        )
    )
    assert len(ours) == images
    with_area = {
        name: (size, [entry for entry in objects if entry[0][2] > entry[0][0] and entry[0][3] > entry[0][1]])
        for name, (size, objects) in theirs.items()
    }
    assert ours == with_area
    assert all((root / 'JPEGImages' / image['file_name']).is_file() for image in read(out / f'{split}.json')['images'])


def test_a_mask_is_the_inscribed_ellipse(voc: Path, convert: Convert) -> None:
    [cell, _] = read(convert(voc, ['test'], '--masks', 'ellipse') / 'test.json')['annotations']
    # VOC counts pixels from 1.
    assert cell['bbox'] == [10, 20, 40, 20]
    assert cell['area'] == pytest.approx(math.pi / 4 * 40 * 20, abs=0.01)
    [polygon] = cell['segmentation']
    x, y = np.array(polygon).reshape(-1, 2).T
    assert ((x - 30) / 20) ** 2 + ((y - 30) / 10) ** 2 == pytest.approx(1, abs=2e-3)
    assert (x.min(), x.max(), y.min(), y.max()) == (10, 50, 20, 40)
    # As MMDetection rasterizes it.
    rasterized = coco_mask.area(coco_mask.merge(coco_mask.frPyObjects([polygon], 48, 64)))
    assert rasterized == pytest.approx(cell['area'], rel=0.03)


def test_difficult_objects_become_crowds_and_empty_boxes_are_dropped(voc: Path, convert: Convert) -> None:
    content = read(convert(voc, ['test']) / 'test.json')
    assert [(a['image_id'], a['category_id'], a['iscrowd']) for a in content['annotations']] == [(1, 1, 0), (1, 2, 1)]
    assert [(image['id'], image['file_name']) for image in content['images']] == [(1, 'a.jpg'), (2, 'b.jpg')]
    assert [category['name'] for category in content['categories']] == list(CLASSES)
    assert [a['area'] for a in content['annotations']] == [800, 900]
    assert all('segmentation' not in a for a in content['annotations'])


def break_xml(root: Path) -> None:
    (root / 'Annotations' / 'a.xml').write_text('<annotation><size>')


def drop_size(root: Path) -> None:
    (root / 'Annotations' / 'a.xml').write_text('<annotation></annotation>')


def drop_file(root: Path) -> None:
    (root / 'Annotations' / 'b.xml').unlink()


@pytest.mark.parametrize(
    ('change', 'split', 'classes', 'message'),
    [
        (None, 'val', CLASSES, r'ImageSets/Main/val.txt cannot be read \(No such file.*VOC layout'),
        (None, 'test', ('RBC',), "a.xml has an object of class 'WBC': add it to --classes RBC"),
        (break_xml, 'test', CLASSES, 'a.xml is not a Pascal VOC annotation: no element found'),
        (drop_size, 'test', CLASSES, 'a.xml is not a Pascal VOC annotation: size/width is missing'),
        (drop_file, 'test', CLASSES, 'b.xml cannot be read'),
    ],
)
def test_a_mistake_is_one_message(
    voc: Path,
    convert: Convert,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path], None] | None,
    split: str,
    classes: tuple[str, ...],
    message: str,
) -> None:
    if change is not None:
        change(voc)
    with pytest.raises(SystemExit) as stopped:
        convert(voc, [split], classes=classes)
    assert stopped.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert re.match(f'error: .*{message}', line)
