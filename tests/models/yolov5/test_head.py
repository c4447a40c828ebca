# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torchvision.ops import box_iou

from mmzsq.errors import UserError
from mmzsq.models.yolov5 import YOLOv5Head

CLASSES = 3


@pytest.fixture
def head() -> YOLOv5Head:
    return YOLOv5Head(CLASSES, widen_factor=0.125).eval()


def random_maps(images: int = 2, rows: int = 2, columns: int = 3) -> list[torch.Tensor]:
    """Draw maps for a network input of 32 * rows by 32 * columns pixels."""
    return [torch.randn(images, 3 * (5 + CLASSES), rows * factor, columns * factor) for factor in (4, 2, 1)]


def plain_nms(bboxes: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> list[int]:
    """Class-wise NMS at an IoU of 0.6 in a plain loop; returns the kept boxes, best first."""
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        rivals = [other for other in kept if labels[other] == labels[index]]
        if not rivals or box_iou(bboxes[[index]], bboxes[rivals]).max() <= 0.6:
            kept.append(index)
    return kept


def test_dense_predictions_equal_a_plain_loop(head: YOLOv5Head, plain) -> None:
    maps = random_maps()
    bboxes, obj_logits, cls_logits = head.dense_predictions(maps)
    expected_bboxes, expected_scores = plain.decode(maps, CLASSES)
    torch.testing.assert_close(bboxes, expected_bboxes, rtol=1e-5, atol=1e-3)
    scores = obj_logits.sigmoid()[..., None] * cls_logits.sigmoid()
    torch.testing.assert_close(scores, expected_scores)


def test_dense_predictions_carry_gradients_to_every_output(head: YOLOv5Head) -> None:
    maps = [m.requires_grad_() for m in random_maps()]
    predictions = head.dense_predictions(maps)
    sum((torch.rand_like(p) * p).sum() for p in predictions).backward()
    assert all((m.grad != 0).all() for m in maps)


def test_detections_equal_a_plain_loop(head: YOLOv5Head, plain) -> None:
    maps = random_maps()
    results = head.predict_by_feat(maps, [dict(img_shape=(64, 96))] * 2)
    bboxes, scores = plain.decode(maps, CLASSES)
    for result, image_bboxes, image_scores in zip(results, bboxes, scores, strict=True):
        places, labels = (image_scores > 0.001).nonzero(as_tuple=True)
        candidates = image_bboxes[places], image_scores[places, labels], labels
        kept = plain_nms(*candidates)[:300]
        expected = image_bboxes[places][kept]
        expected[:, 0::2] = expected[:, 0::2].clamp(0, 96)
        expected[:, 1::2] = expected[:, 1::2].clamp(0, 64)
        torch.testing.assert_close(result.bboxes, expected)
        torch.testing.assert_close(result.scores, candidates[1][kept])
        assert torch.equal(result.labels, labels[kept])


def test_rescaling_undoes_the_letterbox(head: YOLOv5Head) -> None:
    maps = random_maps(1)
    meta = dict(
        img_shape=(64, 96),
        ori_shape=(64, 300),
        scale_factor=(0.5, 1.5),
        pad_param=(16, 16, 21, 21),
    )
    (plain_result,) = head.predict_by_feat(maps, [dict(img_shape=(10**6, 10**6))])
    (result,) = head.predict_by_feat(maps, [meta], rescale=True)
    x, y = (plain_result.bboxes[:, 0::2] - 21) / 0.5, (plain_result.bboxes[:, 1::2] - 16) / 1.5
    inside = (plain_result.bboxes > 0).all(1)
    expected = torch.stack((x.clamp(0, 300), y.clamp(0, 64)), -1).flatten(1)
    torch.testing.assert_close(result.bboxes[inside], expected[inside])
    assert inside.sum() > 20


def test_without_padding_rescaling_is_a_division(head: YOLOv5Head) -> None:
    maps = random_maps(1)
    meta = dict(img_shape=(64, 96), ori_shape=(32, 48), scale_factor=(2.0, 2.0))
    (small,) = head.predict_by_feat(maps, [meta], rescale=True)
    (large,) = head.predict_by_feat(maps, [meta])
    torch.testing.assert_close(small.bboxes * 2, large.bboxes)


def test_low_scores_give_no_detections(head: YOLOv5Head) -> None:
    maps = [torch.full_like(m, -20.0) for m in random_maps(1)]
    (result,) = head.predict_by_feat(maps, [dict(img_shape=(64, 96))])
    assert result.bboxes.shape == (0, 4)
    assert len(result.scores) == len(result.labels) == 0


def test_predict_takes_features_and_data_samples(head: YOLOv5Head) -> None:
    feats = [torch.randn(1, 32, 8, 8), torch.randn(1, 64, 4, 4), torch.randn(1, 128, 2, 2)]
    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), ori_shape=(32, 32), scale_factor=(2.0, 2.0)))
    (result,) = head.predict(feats, [sample], rescale=True)
    assert isinstance(result, InstanceData)
    assert result.bboxes.max() <= 32


def test_trained_anchors_come_with_the_checkpoint(head: YOLOv5Head) -> None:
    other = YOLOv5Head(CLASSES, widen_factor=0.125, anchors=[[(1, 2)] * 3] * 3)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.anchors, head.anchors)


def test_settings_of_unequal_length_are_rejected() -> None:
    with pytest.raises(UserError, match="'strides': 2"):
        YOLOv5Head(CLASSES, strides=(8, 16))


@pytest.mark.parametrize(
    ('test_cfg', 'message'),
    [
        (dict(score_thr=2), 'score_thr'),
        (dict(nms=dict(type='soft_nms', iou_threshold=0.6)), 'test_cfg.nms'),
        (dict(nms=dict(type='nms', iou_threshold=-1)), 'iou_threshold'),
        (dict(max_per_img=0), 'max_per_img'),
        (dict(scor_thr=0.1), 'score_thr'),
    ],
)
def test_a_wrong_test_cfg_is_rejected(test_cfg: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        YOLOv5Head(CLASSES, test_cfg=test_cfg)
