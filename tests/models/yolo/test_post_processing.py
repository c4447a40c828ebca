# SPDX-License-Identifier: Apache-2.0
import torch

from mmzsq.models.yolo.post_processing import PostProcessor

SAME = torch.tensor([[10.0, 10, 50, 50], [11.0, 10, 51, 50]])


def test_a_location_can_yield_several_classes() -> None:
    result = PostProcessor()(SAME[:1], torch.tensor([0.5]), torch.tensor([[0.8, 0.1, 0.9]]))
    assert result.labels.tolist() == [2, 0, 1]
    torch.testing.assert_close(result.scores, torch.tensor([0.45, 0.4, 0.05]))


def test_boxes_suppress_only_boxes_of_their_class() -> None:
    classes = torch.tensor([[0.9, 0.0], [0.0, 0.8]])
    assert len(PostProcessor()(SAME, torch.ones(2), classes).labels) == 2
    result = PostProcessor()(SAME, torch.ones(2), classes[:, :1] + classes[:, 1:])
    torch.testing.assert_close(result.bboxes, SAME[:1])


def test_large_class_indices_do_not_round_coordinates() -> None:
    # An IoU just under the threshold; an offset of 79 images in float32 would round it away.
    bboxes = torch.tensor([[600.0, 600.0, 603.0, 601.0], [600.0, 600.0, 601.799, 601.0]])
    scores = torch.zeros(2, 80)
    scores[:, 79] = torch.tensor([0.9, 0.8])
    assert len(PostProcessor()(bboxes, torch.ones(2), scores).labels) == 2


def test_the_best_are_kept_before_and_after_nms() -> None:
    corners = torch.arange(20.0)[:, None] * 30
    bboxes = torch.cat((corners, corners, corners + 10, corners + 10), dim=1)
    scores = torch.linspace(0.1, 0.9, 20)[:, None]
    few = PostProcessor(max_per_img=3)(bboxes, torch.ones(20), scores)
    torch.testing.assert_close(few.scores, scores[:, 0].flip(0)[:3])
    assert len(PostProcessor(nms_pre=5)(bboxes, torch.ones(20), scores).scores) == 5


def test_equal_scores_keep_their_order() -> None:
    corners = torch.arange(8.0)[:, None] * 30
    bboxes = torch.cat((corners, corners, corners + 10, corners + 10), dim=1)
    result = PostProcessor()(bboxes, torch.ones(8), torch.full((8, 1), 0.5))
    torch.testing.assert_close(result.bboxes, bboxes)
