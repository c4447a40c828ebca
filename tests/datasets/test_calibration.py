# SPDX-License-Identifier: Apache-2.0
"""MMDetection reads a calibration set through a detector's own pipeline."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmengine.structures import InstanceData

from mmzsq.datasets import CalibrationDataset
from mmzsq.errors import UserError
from mmzsq.registry import DATASETS
from mmzsq.synthesis import CalibrationSet

HEIGHT, WIDTH = 40, 60
BOXES = torch.tensor([[[4.0, 6.0, 24.0, 26.0], [30.5, 0.0, 60.0, 20.0]]]).repeat(3, 1, 1)
LABELS = torch.tensor([[0, 2], [1, 1], [2, 0]])
CLASSES = ('cat', 'dog', 'person')
# `person` is also a class of COCO, with another label. The labels of COCO must not be used.


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, HEIGHT, WIDTH, 3), dtype=np.uint8)


def masks() -> torch.Tensor:
    filled = torch.zeros(2, HEIGHT, WIDTH, dtype=torch.bool)
    filled[0, 6:26, 4:24] = True
    filled[1, 0:20, 31:60] = True
    return filled


@pytest.fixture
def root(tmp_path: Path) -> Path:
    calibration_set = CalibrationSet.open(tmp_path, fingerprint={}, num_images=3, shard_size=3, classes=CLASSES)
    labels = [
        InstanceData(bboxes=boxes, labels=classes, masks=masks()) for boxes, classes in zip(BOXES, LABELS, strict=True)
    ]
    calibration_set.write_shard(0, images(), labels)
    calibration_set.merge()
    return tmp_path


PIPELINE = [
    dict(type='mmdet.LoadImageFromFile'),
    dict(type='mmdet.LoadAnnotations', with_bbox=True, with_mask=True),
    dict(type='mmdet.PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape')),
]


def assert_is_the_set(dataset: CocoDataset) -> None:
    assert dataset.metainfo['classes'] == CLASSES
    assert len(dataset) == 3
    for index in range(3):
        item = dataset[index]
        # MMDetection reads BGR.
        rgb = item['inputs'].flip(0).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(rgb, images()[index])
        instances = item['data_samples'].gt_instances
        torch.testing.assert_close(instances.bboxes.tensor, BOXES[index])
        assert torch.equal(instances.labels, LABELS[index])
        np.testing.assert_array_equal(instances.masks.to_ndarray(), masks().numpy())


def test_it_loads_images_boxes_classes_and_masks(root):
    cfg = dict(type='mmzsq.CalibrationDataset', data_root=str(root), pipeline=PIPELINE)
    assert_is_the_set(DATASETS.build(cfg))


def test_plain_coco_dataset_reads_it_too(root):
    assert_is_the_set(
        CocoDataset(
            data_root=str(root),
            ann_file='annotations/instances.json',
            data_prefix=dict(img='images'),
            metainfo=dict(classes=CLASSES),
            pipeline=PIPELINE,
        )
    )


def test_no_meta_information_of_coco_is_inherited(root):
    assert CalibrationDataset(str(root)).metainfo == dict(classes=CLASSES)


def test_further_meta_information_is_kept(root):
    palette = [(1, 2, 3)] * 3
    dataset = CalibrationDataset(str(root), metainfo=dict(palette=palette))
    assert dataset.metainfo == dict(palette=palette, classes=CLASSES)


def test_classes_of_another_detector_are_refused(root):
    with pytest.raises(UserError, match=r"\('cat',\), but the calibration set .* \('cat', 'dog', 'per"):
        CalibrationDataset(str(root), metainfo=dict(classes=('cat',)))


def test_an_incomplete_set_is_refused(root):
    (root / 'images' / '000001.png').unlink()
    with pytest.raises(UserError, match='not complete'):
        CalibrationDataset(str(root))


@pytest.fixture
def files_read(monkeypatch) -> list[str]:
    """Paths of the decoded images."""
    paths: list[str] = []
    transform = LoadImageFromFile.transform

    def counted(self, results):
        paths.append(results['img_path'])
        return transform(self, results)

    monkeypatch.setattr(LoadImageFromFile, 'transform', counted)
    return paths


def test_images_are_decoded_once(root, files_read):
    dataset = CalibrationDataset(str(root), pipeline=PIPELINE)
    assert_is_the_set(dataset)
    read = len(files_read)
    assert set(files_read) == {dataset.get_data_info(index)['img_path'] for index in range(3)}
    assert_is_the_set(dataset)
    assert len(files_read) == read


def test_cached_items_equal_decoded_ones(root, monkeypatch):
    cached = CalibrationDataset(str(root), pipeline=PIPELINE)
    monkeypatch.setattr('mmzsq.datasets.calibration.MAX_CACHED_BYTES', 0)
    decoded = CalibrationDataset(str(root), pipeline=PIPELINE)
    assert cached._images is not None and decoded._images is None
    for index in (0, 2, -1):
        a, b = cached[index], decoded[index]
        assert torch.equal(a['inputs'], b['inputs'])
        assert a['data_samples'].metainfo == b['data_samples'].metainfo
        assert torch.equal(a['data_samples'].gt_instances.bboxes.tensor, b['data_samples'].gt_instances.bboxes.tensor)


@pytest.mark.parametrize(('images_that_fit', 'decoded_again'), [(3, 0), (2, 3)])
def test_a_set_larger_than_the_cache_is_decoded_on_access(
    root, files_read, monkeypatch, images_that_fit, decoded_again
):
    limit = images_that_fit * HEIGHT * WIDTH * 3
    monkeypatch.setattr('mmzsq.datasets.calibration.MAX_CACHED_BYTES', limit)
    dataset = CalibrationDataset(str(root), pipeline=PIPELINE)
    files_read.clear()
    assert_is_the_set(dataset)
    assert len(files_read) == decoded_again


def test_the_pipeline_gets_a_copy_of_a_cached_image(root):
    class Blacken:
        def __call__(self, results):
            results['img'][:] = 0
            return results

    dataset = CalibrationDataset(str(root), pipeline=[*PIPELINE[:2], Blacken(), PIPELINE[2]])
    assert not dataset[0]['inputs'].any()
    dataset.pipeline.transforms.pop(2)
    assert_is_the_set(dataset)


def test_a_process_that_is_not_forked_reads_its_own_files(root, files_read):
    dataset = CalibrationDataset(str(root), pipeline=PIPELINE)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < images().nbytes
    files_read.clear()
    assert_is_the_set(pickle.loads(pickled))
    assert len(files_read) == 3
