# SPDX-License-Identifier: Apache-2.0
"""CrowdDet's second stage takes images with few or no objects, and ignores what is added to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmdet.models.roi_heads import MultiInstanceRoIHead
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.models.multi_instance_roi_head import accept_few_objects
from mmzsq.tasks.detection_task import data_samples

SIZE = (64, 64)
CROWD = torch.tensor([[8.0, 8.0, 40.0, 40.0], [12.0, 8.0, 44.0, 40.0]])
FAR = torch.tensor([[50.0, 50.0, 60.0, 60.0]])


@pytest.fixture
def head() -> Any:
    assigner = dict(
        type='MultiInstanceAssigner', pos_iou_thr=0.5, neg_iou_thr=0.5, min_pos_iou=0.3, match_low_quality=False
    )
    torch.manual_seed(0)
    return MODELS.build(
        dict(
            type='MultiInstanceRoIHead',
            bbox_roi_extractor=dict(
                type='SingleRoIExtractor', roi_layer=dict(type='RoIAlign', output_size=2), out_channels=4,
                featmap_strides=[4],
            ),
            bbox_head=dict(
                type='MultiInstanceBBoxHead', with_refine=False, num_shared_fcs=2, in_channels=4, fc_out_channels=8,
                roi_feat_size=2, num_classes=1, bbox_coder=dict(type='DeltaXYWHBBoxCoder'),
                loss_cls=dict(type='CrossEntropyLoss', use_sigmoid=False, reduction='none'),
                loss_bbox=dict(type='SmoothL1Loss', reduction='none'),
            ),
            train_cfg=ConfigDict(
                assigner=assigner, pos_weight=-1, debug=False,
                sampler=dict(
                    type='MultiInsRandomSampler', num=32, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False
                ),
            ),
            test_cfg=None,
        )
    )  # fmt: skip


def loss(head: Any, bboxes: Tensor, ignored: Tensor | None = None) -> dict[str, Tensor]:
    labels = InstanceData(bboxes=bboxes, labels=torch.zeros(len(bboxes), dtype=torch.long))
    samples: list[DetDataSample] = data_samples([labels], SIZE, torch.device('cpu'))
    if ignored is not None:
        samples[0].ignored_instances = InstanceData(
            bboxes=ignored, labels=torch.full((len(ignored),), -1, dtype=torch.long)
        )
    proposals = InstanceData(bboxes=torch.cat((CROWD + 1, FAR - 20, FAR)), scores=torch.ones(4))
    torch.manual_seed(1)
    features = [torch.rand(1, 4, 16, 16)]
    losses: dict[str, Tensor] = head.loss(features, [proposals], samples)
    return losses


@pytest.mark.parametrize('count', [0, 1])
def test_images_with_few_objects_have_a_loss(head: Any, count: int) -> None:
    if count:
        # With an odd number of boxes. With an even one, MMDetection pairs those of different proposals.
        with pytest.raises(RuntimeError, match='invalid for input of size 5'):
            loss(head, CROWD[:count])
    accept_few_objects(nn.Sequential(head))
    losses = loss(head, CROWD[:count])
    assert all(bool(torch.isfinite(value)) for value in losses.values())
    assert bool(losses['loss_rcnn_emd'] > 0) is (count > 0)


def test_images_with_enough_objects_have_the_loss_of_mmdetection(head: Any) -> None:
    expected = loss(head, CROWD)
    accept_few_objects(head)
    assert type(head) is not MultiInstanceRoIHead
    assert loss(head, CROWD) == expected


def test_an_added_box_is_not_an_example(head: Any) -> None:
    sampled: list[Any] = []
    original = head.bbox_loss
    head.bbox_loss = lambda x, results: (sampled.extend(results), original(x, results))[1]
    accept_few_objects(head)
    loss(head, CROWD[:1])
    [result] = sampled
    assert bool((result.priors >= 0).all())
    # The proposals and the object itself.
    assert len(result.priors) == 5
