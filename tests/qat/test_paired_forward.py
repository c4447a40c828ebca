# SPDX-License-Identifier: Apache-2.0
"""Paired forward passes: both detectors see the teacher's regions, and the student's trunk runs once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.distillation import MASK_ROI_INDICES, FeatureMSELoss, PredictionKLLoss, TwoStagePredictionLoss
from mmzsq.qat import paired_forward as module
from mmzsq.qat.paired_forward import PairedForward, RegionPairedForward, TwoStagePairedForward, build_paired_forward
from mmzsq.tasks.detection_task import sum_losses

SIZE = (64, 96)
HEADS = ['rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head']


def batch() -> tuple[Tensor, list[DetDataSample]]:
    """Two images with an instance each."""
    samples = []
    for label in (0, 2):
        sample = DetDataSample(metainfo=dict(img_shape=SIZE, batch_input_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE))
        masks = torch.zeros(1, *SIZE, dtype=torch.uint8)
        masks[:, 8:50, 8:40] = 1
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[8.0, 8.0, 40.0, 50.0]]),
            labels=torch.tensor([label]),
            masks=BitmapMasks(masks.numpy(), *SIZE),
        )
        samples.append(sample)
    return torch.randn(2, 3, *SIZE), samples


def pair(cfg: Any) -> tuple[nn.Module, nn.Module]:
    """A student whose weights are near the teacher's, and the teacher."""
    teacher = MODELS.build(copy.deepcopy(cfg)).eval().requires_grad_(False)
    student = MODELS.build(cfg).eval()
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.requires_grad_(True).add_(0.1 * parameter.std().nan_to_num(1.0) * torch.randn_like(parameter))
    return student, teacher


@pytest.fixture
def cfg(tiny_cfg: Callable[[str], Any]) -> Any:
    return tiny_cfg('mask-rcnn_r18')


@pytest.fixture
def few_rois(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, 'MAX_BOX_ROIS', 20)
    monkeypatch.setattr(module, 'MAX_MASK_ROIS', 3)


@pytest.mark.usefixtures('few_rois')
def test_both_detectors_see_the_teachers_best_proposals(cfg: Any) -> None:
    """Reference: MMDetection's proposals of the teacher, truncated, through the RoI head of each."""
    student, teacher = pair(cfg)
    inputs, samples = batch()
    compared = build_paired_forward(student, teacher, HEADS)(inputs, samples, with_losses=False)
    assert compared.losses is None
    with torch.no_grad():
        features = {'S': student.extract_feat(inputs), 'T': teacher.extract_feat(inputs)}
        proposals = [found.bboxes[:20] for found in teacher.rpn_head.predict(features['T'], samples)]
        rois = bbox2roi(proposals)
        scores = teacher.roi_head._bbox_forward(features['T'], rois)['cls_score'].softmax(1)[:, :3].amax(1)
        best = [scores[20 * image :][:20].argsort(descending=True)[:3] + 20 * image for image in range(2)]
        for detector, outputs, feats in (
            (student, compared.student, features['S']),
            (teacher, compared.teacher, features['T']),
        ):
            boxes = detector.roi_head._bbox_forward(feats, rois)
            torch.testing.assert_close(outputs['roi_head.bbox_head'], [boxes['cls_score'], boxes['bbox_pred']])
            masks = detector.roi_head._mask_forward(feats, rois[torch.cat(best)])['mask_preds']
            torch.testing.assert_close(outputs['roi_head.mask_head'], [masks])
            levels = [m for kind in detector.rpn_head(feats) for m in kind]
            torch.testing.assert_close(outputs['rpn_head'], levels)
    assert compared.teacher[MASK_ROI_INDICES][0].tolist() == torch.cat(best).tolist()
    assert len(rois) == 40
    student_proposals = student.rpn_head.predict(features['S'], samples)
    assert not torch.allclose(student_proposals[0].bboxes[:20], proposals[0])


@pytest.mark.parametrize('name', ['mask-rcnn_r18', 'mask-rcnn_swin', 'faster-rcnn_r18'])
def test_an_exact_student_has_zero_loss_and_others_get_gradients_everywhere(
    tiny_cfg: Callable[[str], Any], name: str
) -> None:
    student, teacher = pair(tiny_cfg(name))
    inputs, samples = batch()
    losses = [TwoStagePredictionLoss(), FeatureMSELoss(normalize=True)]
    compare = build_paired_forward(student, teacher, {tap for loss in losses for tap in loss.taps(student)})

    def total() -> Tensor:
        compared = compare(inputs, samples, with_losses=False)
        return torch.stack([loss(compared.student, compared.teacher, student) for loss in losses]).sum()

    value = total()
    value.backward()
    assert value.item() > 1e-2
    gradients = {n: parameter.grad for n, parameter in student.named_parameters()}
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients.values())
    for part in ('backbone.', 'neck.', 'rpn_head.rpn_cls', 'rpn_head.rpn_reg', 'roi_head.bbox_head.fc_cls'):
        assert any(gradient.abs().sum() > 0 for n, gradient in gradients.items() if n.startswith(part))
    assert gradients['roi_head.bbox_head.fc_reg.weight'].abs().sum() > 0
    if name.startswith('mask'):
        assert gradients['roi_head.mask_head.conv_logits.weight'].abs().sum() > 0
    student.load_state_dict(teacher.state_dict())
    assert total().item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize('taps', [HEADS, ['rpn_head']], ids=['regions', 'proposals alone'])
def test_the_students_own_loss_matches_and_runs_the_trunk_once(cfg: Any, taps: list[str]) -> None:
    student, teacher = pair(cfg)
    inputs, samples = batch()
    calls: list[str] = []
    for name in ('backbone', 'neck', 'rpn_head.rpn_conv'):
        student.get_submodule(name).register_forward_hook(lambda *_, name=name: calls.append(name))
    torch.manual_seed(1)
    compared = build_paired_forward(student, teacher, taps)(inputs, samples, with_losses=True)
    # The proposal network runs once over each of five levels.
    assert calls == ['backbone', 'neck', *['rpn_head.rpn_conv'] * 5]
    torch.manual_seed(1)
    expected = student.loss(inputs, samples)
    assert compared.losses.keys() == expected.keys()
    assert sum_losses(compared.losses).item() == pytest.approx(sum_losses(expected).item(), rel=1e-5)
    assert len(compared.student['rpn_head']) == 10
    assert 'extract_feat' not in vars(student) and 'forward' not in vars(student.rpn_head)
    sum_losses(compared.losses).backward()
    assert student.backbone.conv1.weight.grad.abs().sum() > 0


def test_roi_heads_do_not_run_if_no_loss_reads_them(cfg: Any) -> None:
    student, teacher = pair(cfg)
    kl = PredictionKLLoss(tau=1.0, join_maps=True, heads=['rpn_head'])
    assert kl.taps(student) == ['rpn_head']
    for detector in (student, teacher):
        detector.roi_head._bbox_forward = None
        detector.rpn_head.predict_by_feat = None
    compared = build_paired_forward(student, teacher, kl.taps(student))(*batch(), with_losses=False)
    assert compared.student.keys() == compared.teacher.keys() == {'rpn_head'}


def test_regions_keep_their_pixels_under_autocast(cfg: Any) -> None:
    student, teacher = pair(cfg)
    seen = []
    for detector in (student, teacher):
        detector.roi_head.bbox_roi_extractor.register_forward_pre_hook(lambda _, args: seen.append(args))
    with torch.autocast('cpu', torch.bfloat16):
        compared = build_paired_forward(student, teacher, HEADS)(*batch(), with_losses=False)
        loss = TwoStagePredictionLoss()(compared.student, compared.teacher, student)
    assert compared.student['rpn_head'][0].dtype == torch.bfloat16
    assert all(tensor.dtype == torch.float32 for features, rois in seen for tensor in (*features, rois))
    rois = seen[0][1]
    assert not torch.equal(rois, rois.bfloat16().float())
    loss.backward()
    assert torch.isfinite(loss) and loss.dtype == torch.float32


def test_other_detectors_run_as_tensors(tiny_cfg: Callable[[str], Any]) -> None:
    student, teacher = pair(tiny_cfg('retinanet_r18'))
    inputs, samples = batch()
    compare = build_paired_forward(student, teacher, ['bbox_head'])
    assert type(compare) is PairedForward
    compared = compare(inputs, samples, with_losses=False)
    for detector, outputs in ((student, compared.student), (teacher, compared.teacher)):
        with torch.no_grad():
            maps = [m for kind in detector(inputs, samples, mode='tensor') for m in kind]
        torch.testing.assert_close(outputs['bbox_head'], maps)


def test_a_two_stage_detector_with_other_heads_runs_on_the_same_regions(cfg: Any) -> None:
    student, teacher = pair(cfg)
    assert type(build_paired_forward(student, teacher, ['rpn_head'])) is TwoStagePairedForward
    student.rpn_head.use_sigmoid_cls = False
    assert type(build_paired_forward(student, teacher, ['rpn_head'])) is RegionPairedForward


class RunsItsHeadTwice(nn.Module):
    """Like CondInst in mode 'tensor', where labels decide which locations the mask head sees."""

    def __init__(self) -> None:
        super().__init__()
        self.bbox_head = nn.Conv2d(3, 2, 1)
        self.runs: list[str] = []

    def forward(self, inputs: Tensor, data_samples: Any, mode: str) -> Tensor:
        self.runs.append(mode)
        return self.bbox_head(inputs) + self.bbox_head(inputs)

    def loss(self, inputs: Tensor, data_samples: Any) -> dict[str, Tensor]:
        self.runs.append('loss')
        return dict(loss=self.bbox_head(inputs).square().mean())


def test_a_second_pass_runs_if_the_loss_calls_a_head_less_often() -> None:
    student, teacher = RunsItsHeadTwice(), RunsItsHeadTwice()
    inputs, samples = batch()
    compared = build_paired_forward(student, teacher, ['bbox_head'])(inputs, samples, with_losses=True)
    assert student.runs == ['loss', 'tensor'] and teacher.runs == ['tensor']
    assert len(compared.student['bbox_head']) == len(compared.teacher['bbox_head']) == 2
    torch.testing.assert_close(compared.losses['loss'], student.bbox_head(inputs).square().mean())
    student.runs.clear()
    build_paired_forward(student, teacher, ['bbox_head'])(inputs, samples, with_losses=False)
    assert student.runs == ['tensor']
