# SPDX-License-Identifier: Apache-2.0
"""Properties of drawn scenes, and how MMDetection reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from mmdet.evaluation import CocoMetric
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from pycocotools import mask as coco_mask
from torch.utils.data import DataLoader

from mmzsq.datasets import ShapesDataset, shapes, shapes_drawing
from mmzsq.datasets.shapes_drawing import CLASS_FREQUENCIES, CLASS_NAMES, Scene, draw_scene
from mmzsq.errors import UserError

LOAD = {'type': 'mmdet.InferencerLoader'}
PIPELINE = [
    LOAD,
    {'type': 'mmdet.LoadAnnotations', 'with_bbox': True, 'with_mask': True},
    {'type': 'mmdet.PackDetInputs', 'meta_keys': ('img_id', 'ori_shape', 'instances')},
]


@pytest.fixture(scope='module')
def scenes() -> list[Scene]:
    return [draw_scene(0, index, 128) for index in range(700)]


@pytest.fixture(autouse=True)
def mmdet_scope() -> Any:
    with DefaultScope.overwrite_default_scope('mmdet'):
        yield


def by_class(scenes: list[Scene], name: str) -> list[tuple[Scene, np.ndarray]]:
    label = CLASS_NAMES.index(name)
    return [(s, m) for s in scenes for k, m in zip(s.labels, s.masks, strict=True) if k == label]


def test_a_scene_depends_on_seed_and_index_only() -> None:
    first = draw_scene(3, 7)
    draw_scene(3, 8)
    np.random.seed(0)
    again = draw_scene(3, 7)
    for name in ('image', 'labels', 'bboxes', 'masks'):
        assert np.array_equal(getattr(first, name), getattr(again, name))
    for other in (draw_scene(3, 8), draw_scene(4, 7)):
        assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize('size', [64, 96, 256])
def test_arrays_have_the_shapes_and_types_promised(size: int) -> None:
    scene = draw_scene(0, 1, size)
    n = len(scene.labels)
    assert (scene.image.shape, scene.image.dtype) == ((size, size, 3), np.uint8)
    assert (scene.labels.shape, scene.labels.dtype) == ((n,), np.int64)
    assert (scene.bboxes.shape, scene.bboxes.dtype) == ((n, 4), np.float32)
    assert (scene.masks.shape, scene.masks.dtype) == ((n, size, size), np.bool_)


def test_boxes_are_tight_around_masks_that_do_not_overlap(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert scene.masks.sum(axis=0).max() == 1
        for box, mask in zip(scene.bboxes, scene.masks, strict=True):
            ys, xs = np.nonzero(mask)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_figures_have_the_form_of_their_class(scenes: list[Scene]) -> None:
    def filled(name: str) -> float:
        """Share of the smallest turned rectangle that a mask with little hidden fills."""
        shares = []
        for _, mask in by_class(scenes, name):
            points = np.argwhere(mask).astype(np.float32)
            width, height = cv2.minAreaRect(points)[1]
            if min(width, height) > 20:
                shares.append(len(points) / ((width + 1) * (height + 1)))
        return float(np.quantile(shares, 0.75))

    assert filled('disc') == pytest.approx(np.pi / 4, abs=0.03)
    assert filled('box') > 0.9
    assert filled('stripes') > 0.9
    assert filled('triangle') == pytest.approx(1 / 2, abs=0.05)
    assert 0.5 < filled('ring') < 0.7
    assert filled('star') < 0.5
    assert filled('crescent') < 0.6
    assert 0.4 < filled('cross') < 0.65


def test_only_rings_have_a_hole(scenes: list[Scene]) -> None:
    def hollow(name: str) -> float:
        """Share of masks that are empty halfway between their extreme points."""
        found = by_class(scenes, name)
        centers = [np.argwhere(mask) for _, mask in found]
        centers = [((p.min(axis=0) + p.max(axis=0)) // 2) for p in centers]
        return float(np.mean([not m[y, x] for (_, m), (y, x) in zip(found, centers, strict=True)]))

    assert hollow('ring') > 0.75
    assert hollow('disc') < 0.25


def test_stripes_are_told_from_a_box_by_texture(scenes: list[Scene]) -> None:
    def spread(name: str) -> float:
        return float(np.median([s.image[m].std(axis=0).mean() for s, m in by_class(scenes, name)]))

    assert spread('stripes') > 2 * spread('box')


def test_color_does_not_depend_on_the_class(scenes: list[Scene]) -> None:
    means = [np.mean([s.image[m].mean(axis=0) for s, m in by_class(scenes, name)], axis=0) for name in CLASS_NAMES]
    assert np.std(means, axis=0).max() < 12


def test_classes_and_counts_follow_their_frequencies(scenes: list[Scene]) -> None:
    labels = np.concatenate([scene.labels for scene in scenes])
    shares = np.bincount(labels, minlength=len(CLASS_NAMES)) / len(labels)
    assert np.abs(shares - CLASS_FREQUENCIES).max() < 0.03
    counts = {len(scene.labels) for scene in scenes}
    assert counts == set(range(1, 9))


def test_sizes_span_a_factor_of_five(scenes: list[Scene]) -> None:
    sides = np.concatenate([s.bboxes[:, 2:] - s.bboxes[:, :2] for s in scenes]).max(axis=1) / 128
    assert np.quantile(sides, 0.95) > 5 * np.quantile(sides, 0.05)
    assert sides.max() < 0.72


def test_mostly_hidden_figures_have_no_label(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = [draw_scene(1, index) for index in range(60)]
    monkeypatch.setattr(shapes_drawing, 'MIN_VISIBLE', 1e-9)
    everything = [draw_scene(1, index) for index in range(60)]
    dropped = 0
    for some, every in zip(usual, everything, strict=True):
        if not np.array_equal(some.image, every.image):
            continue
        boxes = {tuple(box) for box in every.bboxes.tolist()}
        assert {tuple(box) for box in some.bboxes.tolist()} <= boxes
        dropped += len(every.labels) - len(some.labels)
    assert dropped > 0


def test_start_shifts_the_series() -> None:
    assert np.array_equal(ShapesDataset(num_images=1, start=5)[0]['img'], ShapesDataset(num_images=6)[5]['img'])


def test_nothing_is_drawn_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, 'draw_scene', lambda *_: pytest.fail('drawn'))
    assert len(ShapesDataset(num_images=1000)) == 1000


def test_workers_draw_the_same_images() -> None:
    dataset = ShapesDataset(num_images=6, image_size=64, pipeline=PIPELINE)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, shuffle=False)
    for here, there in zip(dataset, loader, strict=True):
        assert here['inputs'].equal(there['inputs'])


def test_mmdet_reads_boxes_labels_and_masks() -> None:
    dataset = ShapesDataset(num_images=4, pipeline=PIPELINE)
    for index, item in enumerate(dataset):
        scene = draw_scene(0, index)
        truth = item['data_samples'].gt_instances
        assert np.array_equal(item['inputs'].permute(1, 2, 0).numpy(), scene.image)
        assert np.array_equal(truth.bboxes.tensor.numpy(), scene.bboxes)
        assert np.array_equal(truth.labels.numpy(), scene.labels)
        assert np.array_equal(truth.masks.masks.astype(bool), scene.masks)
    assert dataset.get_cat_ids(3) == draw_scene(0, 3).labels.tolist()


def test_the_same_pipeline_reads_files(tmp_path: Path) -> None:
    image = draw_scene(0, 0, 64).image
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    pipeline = ShapesDataset(num_images=1, pipeline=[LOAD]).pipeline
    assert np.array_equal(pipeline({'img_path': str(tmp_path / 'image.png')})['img'], image)


def test_coco_metric_is_1_for_the_truth_and_0_for_wrong_classes() -> None:
    dataset = ShapesDataset(num_images=12, pipeline=PIPELINE)
    for shift, expected in ((0, 1.0), (1, 0.0)):
        metric = CocoMetric(metric=['bbox', 'segm'])
        metric.dataset_meta = dataset.metainfo
        for item in dataset:
            sample = item['data_samples'].to_dict()
            truth = sample['gt_instances']
            instances = sample['instances']
            sample['pred_instances'] = InstanceData(
                bboxes=truth['bboxes'].tensor,
                labels=(truth['labels'] + shift) % len(CLASS_NAMES),
                scores=truth['bboxes'].tensor.new_ones(len(instances)),
                masks=[dict(instance['mask']) for instance in instances],
            )
            metric.process({}, [sample])
        result = metric.evaluate(len(dataset))
        assert result['coco/bbox_mAP'] == pytest.approx(expected, abs=0.05)
        assert result['coco/segm_mAP'] == pytest.approx(expected, abs=0.05)


def test_masks_are_plain_json_rle() -> None:
    instance = ShapesDataset(num_images=1).get_data_info(0)['instances'][0]
    assert isinstance(instance['mask']['counts'], str)
    decoded = coco_mask.decode(instance['mask'])
    assert np.array_equal(decoded.astype(bool), draw_scene(0, 0).masks[0])


@pytest.mark.parametrize(
    ('key', 'value'),
    [('num_images', 0), ('num_images', 2.5), ('image_size', 32), ('seed', -1), ('start', True)],
)
def test_a_wrong_number_is_named(key: str, value: Any) -> None:
    with pytest.raises(UserError, match=f'{key} must be an integer of at least .* got {value}'):
        ShapesDataset(**{'num_images': 4, key: value})
