# SPDX-License-Identifier: Apache-2.0
"""The second stages of two detectors see the same regions, whatever heads they have."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures.bbox import bbox2roi
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.distillation import PredictionLoss, RegionPredictionLoss
from mmzsq.masks import ellipse_masks
from mmzsq.qat import paired_forward as module
from mmzsq.qat.paired_forward import RegionPairedForward, build_paired_forward
from mmzsq.qat.region_replay import recording_regions, replaying_regions
from mmzsq.tasks.detection_task import add_ignored_semantic_labels, data_samples, sum_losses

SIZE = (64, 96)


def batch() -> tuple[Tensor, list[Any]]:
    """Two images with an instance each."""
    boxes = torch.tensor([[8.0, 8.0, 60.0, 50.0]])
    entry = InstanceData(bboxes=boxes, labels=torch.tensor([1]), masks=ellipse_masks(boxes, SIZE))
    return torch.randn(2, 3, *SIZE), data_samples([entry, entry], SIZE, torch.device('cpu'))


@pytest.fixture
def pair(tiny_cfg: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], tuple[nn.Module, Any]]:
    """A student whose weights are near the teacher's, and the teacher, by name; on few regions."""
    monkeypatch.setattr(module, 'MAX_BOX_ROIS', 12)
    monkeypatch.setattr(module, 'MAX_REGIONS_WITH_MASKS', 6)

    def pair(name: str) -> tuple[nn.Module, Any]:
        cfg = tiny_cfg(name)
        teacher = MODELS.build(copy.deepcopy(cfg)).eval().requires_grad_(False)
        student = MODELS.build(cfg).eval()
        student.load_state_dict(teacher.state_dict())
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.requires_grad_(True).add_(0.1 * parameter.std().nan_to_num(1.0) * torch.randn_like(parameter))
        return student, teacher

    return pair


def test_each_stage_of_a_cascade_sees_the_teachers_regions(pair: Any) -> None:
    """Reference: the teacher's cascade by MMDetection, and each head of the student on the regions of its stage."""
    student, teacher = pair('cascade-rcnn_r18')
    inputs, samples = batch()
    heads = [f'roi_head.bbox_head.{stage}' for stage in range(3)]
    compare = build_paired_forward(student, teacher, heads)
    assert type(compare) is RegionPairedForward
    compared = compare(inputs, samples, with_losses=False)
    with torch.no_grad():
        features = {'S': student.extract_feat(inputs), 'T': teacher.extract_feat(inputs)}
        proposals = [found.bboxes[:12] for found in teacher.rpn_head.predict(features['T'], samples)]
        rois = bbox2roi(proposals)
        for stage, head in enumerate(heads):
            for detector, outputs, key in ((student, compared.student, 'S'), (teacher, compared.teacher, 'T')):
                answer = detector.roi_head._bbox_forward(stage, features[key], rois)
                torch.testing.assert_close(outputs[head], [answer['cls_score'], answer['bbox_pred']])
            if stage < 2:
                labels = answer['cls_score'][:, :-1].argmax(1)
                refine = teacher.roi_head.bbox_head[stage].regress_by_class
                rois = bbox2roi(
                    [
                        refine(rois[mask][:, 1:], labels[mask], answer['bbox_pred'][mask], samples[image].metainfo)
                        for image in range(2)
                        for mask in [rois[:, 0] == image]
                    ]
                )
    assert not torch.allclose(rois[:, 1:], torch.cat(proposals))


@pytest.mark.parametrize('name', ['cascade-rcnn_r18', 'htc_r18'])
def test_an_exact_student_has_zero_loss_and_others_get_gradients_in_every_head(pair: Any, name: str) -> None:
    student, teacher = pair(name)
    loss = PredictionLoss().resolve(student)
    assert type(loss) is RegionPredictionLoss
    compare = build_paired_forward(student, teacher, loss.taps(student))
    inputs, samples = batch()

    def total() -> Tensor:
        compared = compare(inputs, samples, with_losses=False)
        return loss(compared.student, compared.teacher, student)

    value = total()
    value.backward()
    assert value.item() > 1e-2
    assert [
        layer
        for layer, part in student.named_modules()
        if isinstance(part, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
        and (part.weight.grad is None or not part.weight.grad.any())
    ] == []
    student.load_state_dict(teacher.state_dict())
    assert total().item() == pytest.approx(0, abs=1e-5)


def test_heads_run_in_eval_mode_and_return_to_train_mode(pair: Any) -> None:
    student, teacher = pair('cascade-rcnn_r18')
    student.train()
    seen = []
    student.roi_head.bbox_head[0].fc_cls.register_forward_pre_hook(lambda layer, _: seen.append(layer.training))
    build_paired_forward(student, teacher, ['roi_head.bbox_head.0'])(*batch(), with_losses=False)
    assert seen == [False]
    assert student.roi_head.bbox_head[0].fc_cls.training


def test_an_image_without_proposals_becomes_one_region(pair: Any) -> None:
    student, teacher = pair('cascade-rcnn_r18')
    teacher.rpn_head.test_cfg.min_bbox_size = 10**6
    seen: list[Tensor] = []
    student.roi_head.bbox_roi_extractor[0].register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    build_paired_forward(student, teacher, ['roi_head.bbox_head.0'])(*batch(), with_losses=False)
    assert seen[0].tolist() == [[0, 0, 0, 96, 64], [1, 0, 0, 96, 64]]


def test_the_students_own_loss_matches_and_runs_the_trunk_once(pair: Any) -> None:
    """A detector with a semantic branch has no labeled pixel, so that term is zero."""
    student, teacher = pair('htc_r18')
    inputs, samples = batch()
    add_ignored_semantic_labels(student, samples)
    calls: list[str] = []
    student.backbone.register_forward_hook(lambda *_: calls.append('backbone'))
    torch.manual_seed(1)
    compared = build_paired_forward(student, teacher, ['rpn_head'])(inputs, samples, with_losses=True)
    assert calls == ['backbone']
    assert compared.losses['loss_semantic_seg'] == 0
    torch.manual_seed(1)
    expected = student.train().loss(inputs, samples)
    assert sum_losses(compared.losses).item() == pytest.approx(sum_losses(expected).item(), rel=1e-5)


def test_regions_are_replayed_and_extractors_restored(pair: Any) -> None:
    roi_head = pair('cascade-rcnn_r18')[0].roi_head
    features = [torch.rand(1, 16, 16, 16) for _ in range(4)]
    with recording_regions(roi_head) as regions:
        roi_head.bbox_roi_extractor[1](features, torch.tensor([[0.0, 0, 0, 9, 9]]))
    assert {name: len(calls) for name, calls in regions.items()} == {
        f'bbox_roi_extractor.{i}': int(i == 1) for i in range(3)
    }
    with replaying_regions(roi_head, regions):
        replayed = roi_head.bbox_roi_extractor[1](features, torch.tensor([[0.0, 5, 5, 60, 60]]))
    with recording_regions(roi_head) as outer, recording_regions(roi_head) as inner:
        roi_head.bbox_roi_extractor[1](features, torch.tensor([[0.0, 0, 0, 9, 9]]))
    assert len(outer['bbox_roi_extractor.1']) == len(inner['bbox_roi_extractor.1']) == 1
    assert torch.equal(replayed, roi_head.bbox_roi_extractor[1](features, torch.tensor([[0.0, 0, 0, 9, 9]])))
    assert all('forward' not in vars(extractor) for extractor in roi_head.bbox_roi_extractor)
