# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from plain_yolo26 import PlainYOLO26
from torch.nn import functional as F

from mmzsq.boxes import complete_iou
from mmzsq.distillation.dense import DensePredictions, dense_terms
from mmzsq.errors import UserError
from mmzsq.models.padded_targets import PaddedTargets
from mmzsq.models.yolo11.assignment import assign_targets
from mmzsq.models.yolo26 import YOLO26Head

CLASSES = 3
# Six locations in a row, 8 pixels apart.
POINTS = torch.tensor([[4.0 + 8 * index, 4.0] for index in range(6)])


@pytest.fixture
def head() -> YOLO26Head:
    return YOLO26Head(CLASSES, widen_factor=0.125, test_cfg=dict(score_thr=0.3, max_per_img=20)).eval()


def random_maps(images: int = 2, rows: int = 2, columns: int = 3) -> list[torch.Tensor]:
    """Draw maps for a network input of 32 * rows by 32 * columns pixels, with boxes of about five cells."""
    maps = [torch.randn(images, 4 + CLASSES, rows * factor, columns * factor) for factor in (4, 2, 1)]
    for scale_map in maps:
        scale_map[:, :4].abs_().add_(1.5)
    return maps


def one_target(bbox: tuple[float, float, float, float]) -> PaddedTargets:
    return PaddedTargets(torch.tensor([[bbox]]), torch.tensor([[0]]), torch.ones(1, 1, dtype=torch.bool))


def test_dense_predictions_equal_a_plain_loop(head: YOLO26Head) -> None:
    maps = random_maps()
    bboxes, obj_logits, cls_logits = head.dense_predictions(maps)
    expected_bboxes, expected_scores = PlainYOLO26.decode(maps)
    torch.testing.assert_close(bboxes, expected_bboxes)
    torch.testing.assert_close(cls_logits.sigmoid(), expected_scores)
    torch.testing.assert_close(obj_logits.sigmoid(), expected_scores.amax(-1))


def test_distillation_reaches_every_output_and_is_zero_only_for_equal_ones(head: YOLO26Head) -> None:
    maps = [m.requires_grad_() for m in random_maps()]
    one, other = (DensePredictions(*head.dense_predictions(m)) for m in (maps, random_maps()))
    assert all(abs(term) < 1e-5 for term in dense_terms(one, one))
    sum(dense_terms(one, DensePredictions(*(part.detach() for part in other)))).backward()
    assert all((m.grad != 0).all() for m in maps)


def test_detections_are_the_best_scores_without_nms(head: YOLO26Head) -> None:
    maps = random_maps()
    results = head.predict_by_feat(maps, [dict(img_shape=(64, 96))] * 2)
    bboxes, scores = PlainYOLO26.decode(maps)
    for result, image_bboxes, image_scores in zip(results, bboxes, scores, strict=True):
        rows = [
            (image_scores[place, label].item(), place, label)
            for place in range(len(image_scores))
            for label in range(CLASSES)
            if image_scores[place, label] > 0.3
        ]
        rows.sort(reverse=True)
        places, labels = ([row[index] for row in rows[:20]] for index in (1, 2))
        expected = image_bboxes[places]
        expected[:, 0::2] = expected[:, 0::2].clamp(0, 96)
        expected[:, 1::2] = expected[:, 1::2].clamp(0, 64)
        torch.testing.assert_close(result.bboxes, expected)
        assert result.labels.tolist() == labels


def test_a_target_keeps_its_best_location_even_among_equal_ones() -> None:
    targets = one_target((0.0, 0.0, 48.0, 8.0))
    bboxes = targets.bboxes[0].expand(6, 4)[None]
    scores = torch.tensor([0.5, 0.9, 0.5, 0.9, 0.5, 0.5])[None, :, None]
    found = assign_targets(bboxes, scores, POINTS, targets, 4, 0.5, 6.0, final_topk=1)
    assert (found.score > 0).sum() == 1
    assert found.score.argmax() in (1, 3)
    torch.testing.assert_close(found.score.amax(), torch.tensor(1.0))


def test_small_targets_have_candidates_around_them() -> None:
    # Between the second and the third location, and no location inside.
    targets = one_target((14.0, 2.0, 18.0, 6.0))
    bboxes = torch.tensor([[12.0, 0.0, 20.0, 8.0]]).expand(6, 4)[None]
    scores = torch.full((1, 6, 1), 0.5)
    plain = assign_targets(bboxes, scores, POINTS, targets, 4, 0.5, 6.0)
    found = assign_targets(bboxes, scores, POINTS, targets, 4, 0.5, 6.0, min_side=16.0)
    assert not plain.score.any()
    assert (found.score[0] > 0).tolist() == [False, True, True, False, False, False]


def test_the_loss_of_one_target_is_worked_out_by_hand(head: YOLO26Head) -> None:
    maps = random_maps(images=1)
    bbox = torch.tensor([20.0, 10.0, 70.0, 60.0])
    targets = PaddedTargets(bbox.view(1, 1, 4), torch.tensor([[1]]), torch.ones(1, 1, dtype=torch.bool))
    losses = head.loss_by_targets(maps, targets)
    (bboxes, *_), (scores, *_) = (part for part in PlainYOLO26.decode(maps))
    centers = [
        torch.tensor([(x + 0.5) * s, (y + 0.5) * s])
        for s in (8, 16, 32)
        for y in range(64 // s)
        for x in range(96 // s)
    ]
    overlaps = complete_iou(bboxes, bbox).clamp(min=0)
    inside = torch.stack([((c > bbox[:2]) & (c < bbox[2:])).all() for c in centers])
    alignment = scores[:, 1].sqrt() * overlaps**6 * inside
    best = int(alignment.argmax())
    # The only positive location has its CIoU as its score.
    score = overlaps[best]
    wanted = torch.zeros_like(scores)
    wanted[best, 1] = score
    total = score.clamp(min=1)
    logits = scores.logit()
    expected_cls = F.binary_cross_entropy_with_logits(logits, wanted, reduction='sum') / total
    size = torch.tensor([96.0, 64.0, 96.0, 64.0])
    errors = ((bboxes[best] - bbox).abs() / size).mean()
    torch.testing.assert_close(losses['loss_cls'], 0.5 * expected_cls, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses['loss_bbox'], 7.5 * (1 - score) * score / total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses['loss_l1'], 1.5 * errors * score / total, rtol=1e-4, atol=1e-5)
    assert 0.1 < score < 1


def test_invalid_settings_are_rejected() -> None:
    with pytest.raises(UserError, match='final_topk of YOLO26Head must be at least 1, not 0'):
        YOLO26Head(CLASSES, final_topk=0)
    with pytest.raises(UserError, match='min_side of YOLO26Head must not be negative, but it is -1'):
        YOLO26Head(CLASSES, min_side=-1)
    with pytest.raises(UserError, match=r"or None, not \{'type': 'soft_nms'\}"):
        YOLO26Head(CLASSES, test_cfg=dict(nms=dict(type='soft_nms')))
