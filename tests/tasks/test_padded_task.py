# SPDX-License-Identifier: Apache-2.0
"""The loss for padded targets is the detector's own, and new labels are written in place."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.structures import InstanceData

from mmzsq.synthesis.label_samplers import MultiBoxSampler
from mmzsq.tasks import DetectionTask, build_detection_task
from mmzsq.tasks.padded_task import PAD_MULTIPLE, PaddedTargetsTask

SIZE = (64, 96)


@pytest.fixture(scope='module')
def task(repo: Path) -> PaddedTargetsTask:
    register_all_modules()
    detector = MODELS.build(Config.fromfile(repo / 'configs/shapes/yolov5-p_shapes.py').model)
    detector.init_weights()
    task = build_detection_task(detector)
    assert type(task) is PaddedTargetsTask
    return task


def labels(boxes: tuple[int, int], seed: int) -> list[InstanceData]:
    return MultiBoxSampler(num_boxes=boxes).sample(3, SIZE, 8, torch.Generator().manual_seed(seed))


def test_the_loss_is_the_detectors_own(task: PaddedTargetsTask) -> None:
    images, wanted = torch.rand(3, 3, *SIZE), labels((1, 5), 0)
    plain = DetectionTask(task.detector)
    expected = plain.loss(images, plain.data_samples(wanted, SIZE))
    torch.testing.assert_close(task.loss(images, task.data_samples(wanted, SIZE)), expected)


def test_new_labels_are_written_in_place(task: PaddedTargetsTask) -> None:
    samples = task.data_samples(labels((4, 6), 0), SIZE)
    places = [tensor.data_ptr() for tensor in samples]
    new = labels((1, 3), 1)
    assert task.update_samples(samples, new, SIZE)
    assert [tensor.data_ptr() for tensor in samples] == places
    images = torch.rand(3, 3, *SIZE)
    torch.testing.assert_close(task.loss(images, samples), task.loss(images, task.data_samples(new, SIZE)))


def test_labels_that_do_not_fit_leave_the_samples_unchanged(task: PaddedTargetsTask) -> None:
    samples = task.data_samples(labels((1, 3), 0), SIZE)
    before = [tensor.clone() for tensor in samples]
    assert not task.update_samples(samples, labels((PAD_MULTIPLE + 1, PAD_MULTIPLE + 1), 1), SIZE)
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(samples, before, strict=True))


def test_a_detector_without_such_a_head_takes_no_padded_targets(tiny_cfg: Callable[[str], Config]) -> None:
    detector = MODELS.build(tiny_cfg('retinanet_r18'))
    assert not isinstance(build_detection_task(detector), PaddedTargetsTask)
    assert not DetectionTask(detector).update_samples([], [], SIZE)
