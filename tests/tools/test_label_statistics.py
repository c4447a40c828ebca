# SPDX-License-Identifier: Apache-2.0
"""Tests of tools/analysis_tools/label_statistics.py: hand-worked numbers and mistakes of users."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData

from mmzsq.errors import UserError
from mmzsq.synthesis import CalibrationSet, MultiBoxSampler

TOOL = 'tools/analysis_tools/label_statistics.py'
CLASSES = ('cat', 'dog', 'bird', 'fish')
Write = Callable[..., Path]


@pytest.fixture(scope='module')
def tool(repo: Path) -> dict[str, Any]:
    return runpy.run_path(str(repo / TOOL))


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes an annotation file of 200 x 100 images, from rows of (image, class, width, height)."""

    def write(name: str, rows: list[tuple[int, str, float, float]], images: int, **more: Any) -> Path:
        annotations = [
            dict(id=index, image_id=image, category_id=7 + CLASSES.index(category), bbox=[1.0, 2.0, w, h], **more)
            for index, (image, category, w, h) in enumerate(rows, 1)
        ]
        content = dict(
            images=[dict(id=index, width=200, height=100, file_name=f'{index}.png') for index in range(images)],
            annotations=annotations,
            categories=[dict(id=7 + index, name=name) for index, name in enumerate(CLASSES)],
        )
        path = tmp_path / f'{name}.json'
        path.write_text(json.dumps(content))
        return path

    return write


def of_classes(**counts: int) -> list[tuple[int, str, float, float]]:
    return [(0, name, 20.0, 10.0) for name, count in counts.items() for _ in range(count)]


def test_a_data_set_correlates_fully_with_itself(tool: dict[str, Any], write: Write) -> None:
    path = write('real', of_classes(cat=5, dog=2, fish=1), 1)
    compared = tool['compare'](dict(itself=path), path)
    found = compared['sets']['itself']
    assert found.pop('correlation') == pytest.approx(dict(pearson=1.0, spearman=1.0))
    assert found == compared['annotations']
    assert found['classes'] == dict(cat=5, dog=2, bird=0, fish=1)


def test_correlations_are_those_of_values_and_of_ranks(tool: dict[str, Any], write: Write) -> None:
    real = write('real', of_classes(cat=10, dog=3, bird=2, fish=1), 1)
    made = write('set', of_classes(cat=2, dog=4, bird=1, fish=1), 1)
    found = tool['compare'](dict(made=made), real)['sets']['made']['correlation']
    assert found['pearson'] == pytest.approx(np.corrcoef([10, 3, 2, 1], [2, 4, 1, 1])[0, 1])
    # Equal values share the mean of their ranks: 4 3 2 1 beside 3 4 1.5 1.5.
    assert found['spearman'] == pytest.approx(np.corrcoef([4, 3, 2, 1], [3, 4, 1.5, 1.5])[0, 1])


def test_categories_are_matched_by_name(tool: dict[str, Any], write: Write, tmp_path: Path) -> None:
    real = write('real', of_classes(cat=6, dog=2, bird=1), 1)
    content = json.loads(write('set', of_classes(cat=6, dog=2, bird=1), 1).read_text())
    # Other ids, another order, and no category of fish.
    content['categories'] = [dict(id=99 - found['id'], name=found['name']) for found in content['categories'][2::-1]]
    for annotation in content['annotations']:
        annotation['category_id'] = 99 - annotation['category_id']
    (tmp_path / 'other.json').write_text(json.dumps(content))
    found = tool['compare'](dict(other=tmp_path / 'other.json'), real)['sets']['other']
    assert found['classes'] == dict(bird=1, dog=2, cat=6)
    assert found['correlation']['pearson'] == pytest.approx(1)


def test_a_flat_histogram_correlates_with_nothing(tool: dict[str, Any], write: Write) -> None:
    real = write('real', of_classes(cat=3, dog=1), 1)
    flat = write('flat', of_classes(cat=1, dog=1, bird=1, fish=1), 1)
    compared = tool['compare'](dict(flat=flat, empty=write('empty', [], 2)), real)
    for found in compared['sets'].values():
        assert found['correlation'] == dict(pearson=None, spearman=None)
    assert compared['sets']['empty']['boxes_per_image']['mean'] == 0
    json.dumps(compared, allow_nan=False)
    tool['plot'](compared)


def test_numbers_and_sizes_are_counted(tool: dict[str, Any], write: Write) -> None:
    # In an image of 20,000 pixels: 200 (0.1 of the image, by the square root), 1,024 (0.226), 9,215 and 20,000 (1).
    rows = [(0, 'cat', 20.0, 10.0), (0, 'cat', 32.0, 32.0), (0, 'dog', 95.0, 97.0), (2, 'cat', 200.0, 100.0)]
    found = tool['describe'](tool['read_coco'](write('real', rows, 3)))
    assert found['boxes_per_image'] == dict(mean=4 / 3, min=0, max=3, histogram={'0': 1, '1': 1, '3': 1})
    assert found['count_histogram'] == [1, 0, 1]
    assert found['box_sizes'] == dict(small=0.25, medium=0.5, large=0.25)
    sizes = [0.1, (1024 / 20_000) ** 0.5, (9215 / 20_000) ** 0.5, 1.0]
    assert found['size_quantiles']['0.5'] == pytest.approx((sizes[1] + sizes[2]) / 2)
    assert list(found['size_quantiles']) == ['0.05', '0.1', '0.25', '0.5', '0.75', '0.9', '0.95']
    bins = [index for index, count in enumerate(found['size_histogram']) for _ in range(count)]
    # Fortieths: 0.1 is the end of the fourth.
    assert bins == [3, 9, 27, 39]
    assert len(found['size_histogram']) == 40


@pytest.mark.parametrize('mark', ['iscrowd', 'ignore'])
def test_crowds_and_ignored_objects_do_not_count(tool: dict[str, Any], write: Write, mark: str) -> None:
    found = tool['describe'](tool['read_coco'](write('real', of_classes(cat=3), 1, **{mark: 1})))
    assert found['boxes'] == 0


def test_a_sampler_given_the_histograms_makes_labels_like_the_real_ones(tool: dict[str, Any], write: Write) -> None:
    rows = [(image, 'cat', 12.0, 8.0) for image in range(30) for _ in range(1 + image % 3)]
    rows += [(image, 'cat', 120.0, 80.0) for image in range(30)]
    real = tool['describe'](tool['read_coco'](write('real', rows, 30)))
    sampler = MultiBoxSampler(count_histogram=real['count_histogram'], size_histogram=real['size_histogram'])
    labels = sampler.sample(2000, (100, 200), 4, torch.Generator().manual_seed(0))
    boxes = torch.cat([instances.bboxes for instances in labels])
    drawn = [
        (image, 'cat', float(x2 - x1), float(y2 - y1))
        for image, instances in enumerate(labels)
        for x1, y1, x2, y2 in instances.bboxes
    ]
    made = tool['describe'](tool['read_coco'](write('set', drawn, 2000)))
    assert len(boxes) == made['boxes']
    shares = [np.array(of['size_histogram']) / of['boxes'] for of in (real, made)]
    np.testing.assert_allclose(shares[0], shares[1], atol=0.03)
    np.testing.assert_allclose(*(np.array(of['count_histogram']) / of['images'] for of in (real, made)), atol=0.04)


@pytest.fixture
def calibration_set(tmp_path: Path) -> Path:
    """A complete set of two images with one cat and two dogs."""
    root = tmp_path / 'calibration_set'
    made = CalibrationSet.open(root, fingerprint={}, num_images=2, shard_size=2, classes=CLASSES)
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [8.0, 8.0, 16.0, 16.0]])
    labels = [
        InstanceData(bboxes=boxes[:1], labels=torch.tensor([0])),
        InstanceData(bboxes=boxes, labels=torch.tensor([1, 1])),
    ]
    made.write_shard(0, np.zeros((2, 16, 16, 3), np.uint8), labels)
    made.merge()
    return root


def run(repo: Path, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, 'argv', [TOOL, *map(str, arguments)])
    runpy.run_path(str(repo / TOOL), run_name='__main__')


def test_sets_on_disk_are_compared_into_a_file_and_a_plot(
    repo: Path, write: Write, calibration_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = write('real', of_classes(cat=1, dog=2), 1)
    out, picture = tmp_path / 'out.json', tmp_path / 'out.png'
    arguments = [f'mine={calibration_set}', calibration_set, '--annotations', real, '--out', out, '--plot', picture]
    run(repo, monkeypatch, *arguments)
    sets = json.loads(out.read_text())['sets']
    assert list(sets) == ['mine', str(calibration_set)]
    assert sets['mine']['classes'] == dict(cat=1, dog=2, bird=0, fish=0)
    assert sets['mine']['correlation']['spearman'] == pytest.approx(1)
    height, width = cv2.imread(str(picture)).shape[:2]
    # Two columns.
    assert (height, width) == (1000, 1400)


def test_a_plot_shows_real_and_set_as_percentages(tool: dict[str, Any], write: Write) -> None:
    real = write('real', of_classes(cat=1, fish=3), 1)
    made = write('set', of_classes(cat=1, bird=1), 1)
    figure = tool['plot'](tool['compare'](dict(made=made), real))
    behind, before = (patch.get_data().values for patch in figure.axes[0].patches)
    # By falling number of real ones: fish, cat, then those without any.
    assert behind.tolist() == [75, 25, 0, 0]
    assert before.tolist() == [0, 50, 0, 50]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ['fish', 'cat', 'dog', 'bird']


def test_mistakes_are_named(
    tool: dict[str, Any], write: Write, repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    real = write('real', of_classes(cat=1), 1)
    other = tmp_path / 'other.json'
    for content, message in (
        ('{', 'is not a COCO annotation file'),
        ('[]', 'is not a COCO annotation file'),
        ('{"annotations": []}', "is not a COCO annotation file .*'images'"),
        ('{"annotations": [], "images": [], "categories": []}', 'has no images'),
    ):
        other.write_text(content)
        with pytest.raises(UserError, match=message):
            tool['compare'](dict(other=other), real)
    other.write_text(real.read_text().replace('"dog"', '"class_1"'))
    with pytest.raises(UserError, match=r'categories that are missing in .* \(class_1\): give the annotations'):
        tool['compare'](dict(other=other), real)
    with pytest.raises(UserError, match='holds no calibration set'):
        tool['compare'](dict(other=tmp_path), real)
    with pytest.raises(SystemExit, match='2'):
        run(repo, monkeypatch, 'nowhere.json', '--annotations', real)
    assert 'nowhere.json cannot be read' in capsys.readouterr().err


def test_real_images_are_like_each_other(tool: dict[str, Any], shared: Path) -> None:
    folder = shared / 'data' / 'coco_mini' / 'annotations'
    paths = {name: folder / f'instances_{name}2017.json' for name in ('train', 'val')}
    compared = tool['compare'](dict(val=paths['val']), paths['train'])
    content = json.loads(paths['val'].read_text())
    assert compared['sets']['val']['boxes'] == sum(not found['iscrowd'] for found in content['annotations'])
    assert compared['sets']['val']['correlation']['pearson'] > 0.9
