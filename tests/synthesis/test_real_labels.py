# SPDX-License-Identifier: Apache-2.0
"""Labels of real images, against pycocotools and MMDetection's reader of Pascal VOC; errors for invalid files."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.datasets import XMLDataset
from mmengine.structures import InstanceData
from pycocotools.coco import COCO

from mmzsq.errors import UserError
from mmzsq.masks import ellipse_masks
from mmzsq.registry import LABEL_SAMPLERS
from mmzsq.synthesis import AdaptiveLabelSampler, RealLabelSampler
from mmzsq.synthesis.label_samplers.real import stretch_labels

CELLS = ['RBC', 'WBC', 'Platelets']
SIZE = (64, 96)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(sampler: RealLabelSampler, count: int, num_classes: int = 2, seed: int = 0) -> list[InstanceData]:
    return sampler.sample(count, SIZE, num_classes, generator(seed))


def annotation(image_id: int, bbox: list[float], category_id: int = 3, **more: Any) -> dict[str, Any]:
    return dict(image_id=image_id, bbox=bbox, category_id=category_id, iscrowd=0, **more)


COCO_FILE: dict[str, Any] = dict(
    categories=[dict(id=7, name='dog'), dict(id=3, name='cat')],
    images=[dict(id=index, height=32, width=48) for index in (5, 6, 9)],
    annotations=[
        annotation(5, [4.0, 8.0, 16.0, 10.0]),
        annotation(5, [20.0, 10.0, 12.0, 20.0], 7, segmentation=[[20, 10, 32, 10, 32, 30, 20, 30]]),
        annotation(6, [0.0, 0.0, 48.0, 32.0], 7),
    ],
)


@pytest.fixture
def coco_file(tmp_path: Path) -> Path:
    return write(tmp_path, COCO_FILE)


def write(folder: Path, content: Any) -> Path:
    path = folder / 'instances.json'
    path.write_text(json.dumps(content))
    return path


def changed(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(COCO_FILE), **changes}


# COCO.


def test_every_object_of_coco_is_read_but_crowds(shared: Path, capsys: Any) -> None:
    path = shared / 'data/coco_mini/annotations/instances_val2017_masks.json'
    sampler = RealLabelSampler(str(path))
    coco = COCO(path)
    ids = sorted(coco.getCatIds())
    assert sampler.classes == [category['name'] for category in coco.loadCats(ids)]
    assert sum(a['iscrowd'] for a in coco.loadAnns(coco.getAnnIds())) > 0
    images = [image for image in coco.loadImgs(coco.getImgIds()) if coco.getAnnIds(image['id'], iscrowd=False)]
    assert len(images) == len(sampler.images) > 100
    by_size = {(len(o.labels), o.image_size, o.bboxes.sum().item()): o for o in sampler.images}
    assert len(by_size) == len(images)
    for image, objects in list(zip(images, sampler.images, strict=True))[::10]:
        real = coco.loadAnns(coco.getAnnIds(image['id'], iscrowd=False))
        labels = stretch_labels(objects, (image['height'], image['width']))
        # At the image's own size only what is thinner than a pixel goes.
        real = [a for a in real if min(a['bbox'][2:]) >= 1]
        xywh = torch.tensor([a['bbox'] for a in real])
        torch.testing.assert_close(labels.bboxes, torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1))
        assert labels.labels.tolist() == [ids.index(a['category_id']) for a in real]
        np.testing.assert_array_equal(labels.masks.numpy(), [coco.annToMask(a) for a in real])


def test_boxes_and_masks_are_stretched_to_the_size_wanted(coco_file: Path) -> None:
    [labels] = [found for found in draw(RealLabelSampler(str(coco_file)), 2) if len(found) == 2]
    # From 32 x 48 to 64 x 96.
    assert labels.bboxes.tolist() == [[8.0, 16.0, 40.0, 36.0], [40.0, 20.0, 64.0, 60.0]]
    # By rising id, not as they stand in the file: cat is 3, dog is 7.
    assert labels.labels.tolist() == [0, 1]
    assert (labels.bboxes.dtype, labels.labels.dtype, labels.masks.dtype) == (torch.float32, torch.long, torch.bool)
    # The first object has no segmentation, the second a rectangle, whose corners interpolation may round.
    assert torch.equal(labels.masks[:1], ellipse_masks(labels.bboxes[:1], SIZE))
    rectangle = torch.zeros(SIZE, dtype=torch.bool)
    rectangle[20:60, 40:64] = True
    assert (labels.masks[1] ^ rectangle).sum() <= 4


def test_labels_without_any_segmentation_have_no_masks(coco_file: Path) -> None:
    assert sorted('masks' in labels for labels in draw(RealLabelSampler(str(coco_file)), 2)) == [False, True]


@pytest.mark.parametrize(
    'segmentation',
    [
        dict(size=[32, 48], counts=[20 * 32 + 10, 20, 12, 20, 12, 20, 32 * 48]),
        [[1.0, 1.0, 2.0, 2.0], [20, 10, 23, 10, 23, 30, 20, 30]],
    ],
)
def test_run_lengths_and_broken_polygons_are_read(tmp_path: Path, segmentation: Any) -> None:
    counts = segmentation['counts'] if isinstance(segmentation, dict) else None
    if counts is not None:
        counts[-1] = 32 * 48 - sum(counts[:-1])
    content = changed(annotations=[annotation(5, [20.0, 10.0, 3.0, 20.0], segmentation=segmentation)])
    [objects] = RealLabelSampler(str(write(tmp_path, content))).images
    expected = torch.zeros(32, 48, dtype=torch.bool)
    expected[10:30, 20:23] = True
    assert torch.equal(stretch_labels(objects, (32, 48)).masks[0], expected)


def test_classes_select_and_order_categories(coco_file: Path) -> None:
    both = RealLabelSampler(str(coco_file), classes=['dog', 'cat'])
    assert [labels.labels.tolist() for labels in draw(both, 2) if len(labels) == 2] == [[1, 0]]
    cats = RealLabelSampler(str(coco_file), classes=['cat'])
    # The image that holds dogs alone is not drawn.
    assert [labels.bboxes.tolist() for labels in draw(cats, 2, 1)] == [[[8.0, 16.0, 40.0, 36.0]]] * 2


@pytest.mark.parametrize('mark', [dict(iscrowd=1), dict(ignore=1)])
def test_crowds_and_ignored_objects_are_left_out(tmp_path: Path, mark: dict[str, int]) -> None:
    content = changed()
    content['annotations'][0].update(mark)
    sampler = RealLabelSampler(str(write(tmp_path, content)))
    assert [len(labels) for labels in draw(sampler, 4)] == [1, 1, 1, 1]


def test_boxes_thinner_than_a_pixel_are_dropped_and_images_without_any_skipped(tmp_path: Path) -> None:
    thin = annotation(5, [1.0, 1.0, 20.0, 0.4], segmentation=[[1, 1, 21, 1, 21, 2, 1, 2]])
    content = changed()
    content['annotations'] += [thin, {**thin, 'image_id': 9}]
    sampler = RealLabelSampler(str(write(tmp_path, content)))
    assert len(sampler.images) == 3
    drawn = draw(sampler, 6)
    assert Counter(len(labels) for labels in drawn) == {1: 3, 2: 3}
    # What is below a pixel at 64 px is none at 160.
    assert Counter(map(len, sampler.sample(6, (160, 96), 2, generator()))) == {1: 4, 3: 2}
    with pytest.raises(UserError, match='as large as a pixel of a 1 x 1 image'):
        RealLabelSampler(str(write(tmp_path, changed(annotations=[thin])))).sample(1, (1, 1), 2, generator())


# Drawing.


def test_every_image_is_drawn_once_before_any_is_drawn_again(shared: Path) -> None:
    sampler = RealLabelSampler('ImageSets/Main/test.txt', str(shared / 'data/bccd'), 'voc', CELLS)
    count = len(sampler.images)
    assert count == 72
    keys = [(len(labels), labels.bboxes.sum().item()) for labels in sampler.sample(2 * count, SIZE, 3, generator())]
    assert len(set(keys[:count])) == count
    assert sorted(keys[:count]) == sorted(keys[count:])
    assert keys[:count] != keys[count:]


def test_the_generator_alone_decides(shared: Path) -> None:
    sampler = RealLabelSampler('ImageSets/Main/test.txt', str(shared / 'data/bccd'), 'voc', CELLS)
    first, second, other = ([labels.bboxes.sum().item() for labels in draw(sampler, 9, 3, s)] for s in (1, 1, 2))
    assert first == second != other


def test_it_uses_real_labels_alone_and_as_a_start(coco_file: Path) -> None:
    cfg = dict(type='mmzsq.RealLabelSampler', ann_file=str(coco_file))
    assert LABEL_SAMPLERS.build(cfg).uses_real_labels
    adaptive = AdaptiveLabelSampler(start=cfg)
    assert adaptive.uses_real_labels
    assert sorted(len(labels) for labels in adaptive.sample(2, SIZE, 2, generator())) == [1, 2]


# Pascal VOC.


@pytest.mark.parametrize('split', ['ImageSets/Main/trainval.txt', None])
def test_voc_is_read_as_mmdetection_reads_it(shared: Path, split: str | None) -> None:
    root = shared / 'data/bccd'
    sampler = RealLabelSampler(split, str(root), 'voc', CELLS)
    names = (root / split).read_text().split() if split else sorted(p.stem for p in root.glob('Annotations/*.xml'))
    reader = XMLDataset(
        ann_file=str(root / 'ImageSets/Main/trainval.txt'),
        data_prefix=dict(sub_data_root=str(root)),
        metainfo=dict(classes=CELLS),
        lazy_init=True,
    )
    reader.cat2label = {name: index for index, name in enumerate(CELLS)}
    read = []
    for name in names:
        info = dict(img_id=name, file_name=f'JPEGImages/{name}.jpg', xml_path=str(root / f'Annotations/{name}.xml'))
        read.append(reader.parse_data_info(info))
    read = [item for item in read if item['instances']]
    assert len(read) == len(sampler.images) == (292 if split else 364)
    for expected, objects in zip(read, sampler.images, strict=True):
        assert objects.image_size == (expected['height'], expected['width'])
        assert objects.labels.tolist() == [item['bbox_label'] for item in expected['instances']]
        bboxes = torch.tensor([item['bbox'] for item in expected['instances']]).float()
        limit = torch.tensor([expected['width'], expected['height']] * 2)
        torch.testing.assert_close(objects.bboxes, bboxes.clamp(min=0).minimum(limit))


def voc_object(name: str, difficult: int = 0) -> str:
    box = '<xmin>11</xmin><ymin>6</ymin><xmax>31</xmax><ymax>26.5</ymax>'
    return f'<object><name> {name} </name><difficult>{difficult}</difficult><bndbox>{box}</bndbox></object>'


def voc(folder: Path, objects: str, head: str = '', size: str = '<width>48</width><height>32</height>') -> Path:
    (folder / 'Annotations').mkdir(exist_ok=True)
    text = f'{head}<annotation><size>{size}</size>{objects}</annotation>'
    (folder / 'Annotations' / 'a.xml').write_text(text)
    return folder


def read_voc(folder: Path, **options: Any) -> RealLabelSampler:
    return RealLabelSampler(data_root=str(folder), format='voc', **{'classes': ['cat'], **options})


def test_difficult_objects_and_other_classes_are_left_out(tmp_path: Path) -> None:
    objects = voc_object('cat') + voc_object('cat', 1) + voc_object('dog')
    [image] = read_voc(voc(tmp_path, objects)).images
    assert image.bboxes.tolist() == [[10.0, 5.0, 30.0, 25.5]]
    assert image.labels.tolist() == [0]
    assert 'masks' not in stretch_labels(image, SIZE)


def test_a_document_that_defines_entities_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / 'secret.txt'
    secret.write_text('cat')
    head = f'<!DOCTYPE annotation [<!ENTITY name SYSTEM "{secret.as_uri()}">]>'
    for encoding in ('utf-8', 'utf-16'):
        path = voc(tmp_path, voc_object('&name;'), head) / 'Annotations' / 'a.xml'
        path.write_text(path.read_text(), encoding=encoding)
        with pytest.raises(UserError, match='document type'):
            read_voc(tmp_path)


@pytest.mark.parametrize(
    ('objects', 'size', 'message'),
    [
        ('<object>', '', 'a.xml is not a Pascal VOC annotation'),
        (voc_object('cat'), '<width>48</width>', 'annotation lacks size/height'),
        (voc_object('cat').replace('<ymax>26.5</ymax>', ''), None, 'object lacks bndbox/ymax'),
        (voc_object('cat').replace('26.5', 'low'), None, 'low'),
        (voc_object('cats'), None, "Annotations has no object of class 'cat'; did you mean 'cats'"),
        ('', None, "has no object of class 'cat'; it has no objects"),
    ],
)
def test_mistakes_in_voc_are_named(tmp_path: Path, objects: str, size: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_voc(voc(tmp_path, objects, **({} if size is None else dict(size=size))))


# Arguments and files that are not right.


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(), 'needs ann_file'),
        (dict(format='yolo'), "format is 'coco' or 'voc', not 'yolo'"),
        (dict(format='voc', classes=['cat']), 'needs data_root'),
        (dict(format='voc', data_root='here'), 'needs data_root.* and classes'),
        (dict(format='voc', data_root='here', classes=['a'], ann_file='list.txt'), 'here/list.txt cannot be read'),
        (dict(ann_file='nowhere.json'), 'nowhere.json cannot be read'),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        RealLabelSampler(**arguments)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        ([1, 2], 'not a COCO annotation file'),
        (changed(categories=[]), 'not a COCO annotation file'),
        (changed(annotations=[annotation(77, [0, 0, 5, 5])]), r'not a COCO annotation file \(KeyError\(77\)\)'),
        (changed(annotations=[annotation(5, [0, 0])]), 'not a COCO annotation file'),
        (changed(annotations=[]), 'no object of the requested classes'),
    ],
)
def test_mistakes_in_coco_are_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        RealLabelSampler(str(write(tmp_path, content)))


def test_other_classes_than_the_detectors_are_refused(coco_file: Path) -> None:
    with pytest.raises(UserError, match='read with 2 classes, but the detector has 80'):
        draw(RealLabelSampler(str(coco_file)), 1, 80)
    with pytest.raises(UserError, match="no object of class 'dgo'; did you mean 'dog'"):
        RealLabelSampler(str(coco_file), classes=['cat', 'dgo'])
