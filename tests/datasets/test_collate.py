# SPDX-License-Identifier: Apache-2.0
"""A batch collated into one tensor is preprocessed like single images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from mmdet.models import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmengine.dataset import pseudo_collate
from mmengine.structures import InstanceData

from mmzsq.datasets import stack_images
from mmzsq.registry import FUNCTIONS


def items(sizes: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for index, size in enumerate(sizes):
        boxes = torch.rand(index + 1, 4, generator=generator)
        instances = InstanceData(bboxes=boxes, labels=torch.arange(index + 1))
        sample = DetDataSample(metainfo=dict(img_shape=size, img_id=index), gt_instances=instances)
        image = torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)
        found.append(dict(inputs=image, data_samples=sample))
    return found


@pytest.mark.parametrize('sizes', [[(40, 64), (40, 64)], [(40, 64), (64, 33)]])
def test_preprocessed_batches_equal_those_of_single_images(sizes: list[tuple[int, int]]) -> None:
    preprocess = DetDataPreprocessor(
        mean=[1.0, 2.0, 3.0], std=[4.0, 5.0, 6.0], bgr_to_rgb=True, pad_size_divisor=32, pad_value=7
    )
    stacked, single = stack_images(items(sizes)), pseudo_collate(items(sizes))
    assert isinstance(stacked['inputs'], torch.Tensor) == (len(set(sizes)) == 1)
    stacked, single = preprocess(stacked, True), preprocess(single, True)
    assert torch.equal(stacked['inputs'], single['inputs'])
    for one, other in zip(stacked['data_samples'], single['data_samples'], strict=True):
        assert one.metainfo == other.metainfo and 'pad_shape' in one.metainfo
        assert torch.equal(one.gt_instances.bboxes, other.gt_instances.bboxes)


def test_unused_labels_are_dropped() -> None:
    data = FUNCTIONS.get('mmzsq.stack_images')(items([(8, 8)] * 3), labels=False)
    assert [sample.img_id for sample in data['data_samples']] == [0, 1, 2]
    for sample in data['data_samples']:
        assert not len(sample.gt_instances) and not len(sample.ignored_instances)
