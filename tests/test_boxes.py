# SPDX-License-Identifier: Apache-2.0
"""Box arithmetic against MMDetection's and torchvision's."""

import torch
from mmdet.models.task_modules import DeltaXYWHBBoxCoder
from torch.testing import assert_close
from torchvision.ops import batched_nms, box_iou

from mmzsq.boxes import DeltaCoder, pairwise_iou, suppress

DEVICE = torch.device('cpu')


def random_bboxes(*shape: int) -> torch.Tensor:
    low = torch.rand(*shape, 2) * 60
    return torch.cat((low, low + 4 + torch.rand(*shape, 2) * 40), dim=-1)


def test_overlaps_equal_torchvisions_image_by_image() -> None:
    bboxes, others = random_bboxes(2, 7), random_bboxes(2, 5)
    expected = torch.stack([box_iou(*pair) for pair in zip(bboxes, others, strict=True)])
    assert_close(pairwise_iou(bboxes, others), expected)


def test_offsets_equal_mmdetections_coder() -> None:
    coder = DeltaXYWHBBoxCoder(target_means=(0.1, 0.0, -0.1, 0.0), target_stds=(0.1, 0.1, 0.2, 0.3))
    ours = DeltaCoder.of(coder, DEVICE)
    bboxes, targets = random_bboxes(40), random_bboxes(40)
    assert_close(ours.encode(bboxes, targets), coder.encode(bboxes, targets))
    deltas = torch.randn(40, 4) * 20
    assert_close(ours.decode(bboxes, deltas, (50, 80)), coder.decode(bboxes, deltas, max_shape=(50, 80)))


def test_decoded_boxes_pass_the_edge_if_the_coder_lets_them() -> None:
    coder = DeltaXYWHBBoxCoder(clip_border=False)
    decoded = DeltaCoder.of(coder, DEVICE).decode(random_bboxes(40), torch.ones(40, 4), (50, 80))
    assert decoded.max() > 80


def test_suppression_is_greedy_within_a_group() -> None:
    bboxes = random_bboxes(3, 80)
    groups = torch.randint(2, (3, 80))
    eligible = torch.rand(3, 80) > 0.2
    kept = suppress(bboxes, groups, eligible, 0.4)
    falling = torch.arange(80, 0, -1).float()
    for image in range(3):
        index = eligible[image].nonzero().flatten()
        chosen = batched_nms(bboxes[image, index], falling[index], groups[image, index], 0.4)
        assert kept[image].nonzero().flatten().tolist() == sorted(index[chosen].tolist())
        assert 0 < len(chosen) < len(index)
