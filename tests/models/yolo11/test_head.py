# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from mmdet.structures import DetDataSample
from torchvision.ops import box_iou

from mmzsq.distillation.dense import DensePredictions, dense_terms
from mmzsq.errors import UserError
from mmzsq.models.yolo11 import YOLO11Head

CLASSES = 3


@pytest.fixture
def head() -> YOLO11Head:
    return YOLO11Head(CLASSES, widen_factor=0.125, test_cfg=dict(nms=dict(type='nms', iou_threshold=0.7))).eval()


def random_maps(images: int = 2, rows: int = 2, columns: int = 3) -> list[torch.Tensor]:
    """Draw maps for a network input of 32 * rows by 32 * columns pixels."""
    return [torch.randn(images, 64 + CLASSES, rows * factor, columns * factor) for factor in (4, 2, 1)]


def plain_nms(bboxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> list[int]:
    """Class-wise NMS at an IoU of 0.7 in a plain loop; returns the kept boxes, best first."""
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        rivals = [other for other in kept if labels[other] == labels[index]]
        if not rivals or box_iou(bboxes[[index]], bboxes[rivals]).max() <= 0.7:
            kept.append(index)
    return kept


def test_dense_predictions_equal_a_plain_loop(head: YOLO11Head, plain) -> None:
    maps = random_maps()
    bboxes, obj_logits, cls_logits = head.dense_predictions(maps)
    expected_bboxes, expected_scores = plain.decode(maps)
    torch.testing.assert_close(bboxes, expected_bboxes, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(cls_logits.sigmoid(), expected_scores)
    torch.testing.assert_close(obj_logits.sigmoid(), expected_scores.amax(-1))


def test_dense_predictions_carry_gradients_to_every_output(head: YOLO11Head) -> None:
    maps = [m.requires_grad_() for m in random_maps()]
    predictions = head.dense_predictions(maps)
    sum((torch.rand_like(p) * p).sum() for p in predictions).backward()
    assert all((m.grad != 0).all() for m in maps)


def test_autocast_does_not_reduce_the_precision_of_boxes(head: YOLO11Head) -> None:
    maps = random_maps()
    expected, _, _ = head.dense_predictions(maps)
    with torch.autocast('cpu', torch.bfloat16):
        bboxes, _, _ = head.dense_predictions(maps)
    assert torch.equal(bboxes, expected)


def test_distillation_loss_is_zero_only_for_equal_outputs(head: YOLO11Head) -> None:
    one, other = (DensePredictions(*head.dense_predictions(random_maps())) for _ in range(2))
    assert all(abs(term) < 1e-5 for term in dense_terms(one, one))
    assert all(term > 0.01 for term in dense_terms(one, other))


def test_detections_equal_a_plain_loop(head: YOLO11Head, plain) -> None:
    maps = random_maps()
    results = head.predict_by_feat(maps, [dict(img_shape=(64, 96))] * 2)
    bboxes, scores = plain.decode(maps)
    for result, image_bboxes, image_scores in zip(results, bboxes, scores, strict=True):
        places, labels = (image_scores > 0.001).nonzero(as_tuple=True)
        candidates = image_bboxes[places], image_scores[places, labels], labels
        kept = plain_nms(*candidates)[:300]
        expected = image_bboxes[places][kept]
        expected[:, 0::2] = expected[:, 0::2].clamp(0, 96)
        expected[:, 1::2] = expected[:, 1::2].clamp(0, 64)
        torch.testing.assert_close(result.bboxes, expected, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(result.scores, candidates[1][kept])
        assert torch.equal(result.labels, labels[kept])


def test_rescaling_undoes_the_letterbox(head: YOLO11Head) -> None:
    maps = random_maps(1)
    # Large logits for short distances give boxes inside the image.
    for scale_map in maps:
        scale_map[:, [1, 17, 33, 49]] += 8.0
    meta = dict(img_shape=(64, 96), ori_shape=(64, 300), scale_factor=(0.5, 1.5), pad_param=(16, 16, 21, 21))
    (plain_result,) = head.predict_by_feat(maps, [dict(img_shape=(10**6, 10**6))])
    (result,) = head.predict_by_feat(maps, [meta], rescale=True)
    x, y = (plain_result.bboxes[:, 0::2] - 21) / 0.5, (plain_result.bboxes[:, 1::2] - 16) / 1.5
    inside = (plain_result.bboxes > 0).all(1)
    expected = torch.stack((x.clamp(0, 300), y.clamp(0, 64)), -1).flatten(1)
    torch.testing.assert_close(result.bboxes[inside], expected[inside])
    assert inside.sum() > 20


def test_predict_takes_features_and_data_samples(head: YOLO11Head) -> None:
    feats = [torch.randn(1, c, 64 // s, 64 // s) for c, s in ((32, 8), (64, 16), (64, 32))]
    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(32, 32), scale_factor=(2.0, 2.0)))
    (result,) = head.predict(feats, [sample], rescale=True)
    assert len(result) > 0 and result.bboxes.max() <= 32


def test_invalid_settings_are_rejected() -> None:
    with pytest.raises(UserError, match='got 2 and 3'):
        YOLO11Head(CLASSES, strides=(8, 16))
    with pytest.raises(UserError, match='reg_max of YOLO11Head must be at least 2, not 1'):
        YOLO11Head(CLASSES, reg_max=1)
    with pytest.raises(UserError, match='topk of YOLO11Head must be at least 1, not 0'):
        YOLO11Head(CLASSES, topk=0)
    with pytest.raises(UserError, match="Did you mean 'score_thr'"):
        YOLO11Head(CLASSES, test_cfg=dict(score_th=0.1))
