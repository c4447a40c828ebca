# SPDX-License-Identifier: Apache-2.0
"""The KL loss of raw predictions against torch.distributions, and the recorder of outputs."""

import pytest
import torch
from torch import nn
from torch.distributions import Categorical
from torch.distributions import kl_divergence as reference_kl

from mmzsq.distillation import PredictionKLLoss, Recorder, match_modules
from mmzsq.errors import UserError


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.bbox_head = nn.Conv2d(4, 6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bbox_head(self.backbone(x))


@pytest.mark.parametrize('tau', [1.0, 4.0])
def test_kl_is_that_of_each_map_flattened_into_one_softmax(tau: float) -> None:
    torch.manual_seed(0)
    student = [torch.randn(2, 6, 4, 4), torch.randn(2, 6, 2, 2)]
    teacher = [torch.randn(2, 6, 4, 4), torch.randn(2, 6, 2, 2)]
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        for image in range(2):
            kl = reference_kl(
                Categorical(logits=t[image].flatten() / tau), Categorical(logits=s[image].flatten() / tau)
            )
            expected += 0.1 * tau**2 * float(kl) / 2
    loss = PredictionKLLoss(tau=tau, loss_weight=0.1)
    got = loss({'bbox_head': student}, {'bbox_head': teacher}, Detector())
    assert float(got) == pytest.approx(expected, rel=1e-4)


def test_kl_over_joined_maps_is_one_vector_an_image() -> None:
    torch.manual_seed(0)
    student, teacher = ([torch.randn(1, 3, 2, 2), torch.randn(1, 3, 1, 1)] for _ in range(2))
    joined_s, joined_t = (torch.cat([m.flatten() for m in maps]) for maps in (student, teacher))
    expected = float(reference_kl(Categorical(logits=joined_t), Categorical(logits=joined_s)))
    loss = PredictionKLLoss(tau=1.0, loss_weight=1.0, join_maps=True)
    assert float(loss({'bbox_head': student}, {'bbox_head': teacher}, Detector())) == pytest.approx(expected, rel=1e-4)


def test_heads_are_those_of_maps_and_of_masks_where_there_are_no_others() -> None:
    detector = nn.Module()
    with pytest.raises(UserError, match='none of rpn_head, bbox_head, mask_head'):
        PredictionKLLoss().taps(detector)
    detector.mask_head = nn.Conv2d(4, 6, 1)
    assert PredictionKLLoss().taps(detector) == ['mask_head']
    detector.bbox_head = nn.Conv2d(4, 6, 1)
    assert PredictionKLLoss().taps(detector) == ['bbox_head']
    detector.as_two_stage = True
    detector.decoder = nn.Module()
    detector.decoder.num_layers = 6
    assert PredictionKLLoss().taps(detector) == ['bbox_head', 'bbox_head.cls_branches.6', 'bbox_head.reg_branches.6']


def test_recorder_records_calls_and_direct_forwards_and_restores_them() -> None:
    detector = Detector().eval()
    recorder = Recorder(detector, ['backbone.1', 'bbox_head'])
    images = torch.rand(1, 3, 4, 4)
    with recorder.recording() as outputs:
        result = detector(images)
        # As SingleStageDetector._forward calls its head.
        detector.bbox_head.forward(detector.backbone(images))
    assert len(outputs['bbox_head']) == 2 and len(outputs['backbone.1']) == 2
    assert torch.equal(outputs['bbox_head'][0], result) and torch.equal(outputs['bbox_head'][1], result)
    detector(images)
    assert len(outputs['bbox_head']) == 2


def test_nested_recorders_of_one_module_both_record_every_call() -> None:
    detector = Detector().eval()
    head, images = detector.bbox_head, torch.rand(1, 4, 2, 2)
    outer, inner = Recorder(detector, ['bbox_head']), Recorder(detector, ['bbox_head', 'backbone.0'])
    with outer.recording() as of_outer:
        head(images)
        with inner.recording() as of_inner:
            head(2 * images)
        head(3 * images)
    assert [output.equal(head(scale * images)) for scale, output in enumerate(of_outer['bbox_head'], 1)] == [True] * 3
    assert [output.equal(head(2 * images)) for output in of_inner['bbox_head']] == [True]
    assert 'forward' not in vars(head)


def test_modules_are_matched_by_pattern_expression_and_type() -> None:
    detector = Detector()
    assert match_modules(detector, ['backbone.*']) == ['backbone.0', 'backbone.1', 'backbone.2']
    assert match_modules(detector, ['re:.*head']) == ['bbox_head']
    assert match_modules(detector, ['type:_BatchNorm', 'type:Conv2d']) == ['backbone.0', 'backbone.1', 'bbox_head']
    with pytest.raises(UserError, match='neck'):
        match_modules(detector, ['neck.*'])
