# SPDX-License-Identifier: Apache-2.0
"""The offset of scores: found where it was taken away, and added to the logits of the scores alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from quantized_detectors import scenes, shipped_detector

from mmzsq.errors import UserError
from mmzsq.qat.score_offset import ScoreCalibration, score_offset
from mmzsq.quantization import quantizers


@pytest.mark.parametrize('shift', [-1.5, -0.3, 0.0, 0.7])
@pytest.mark.parametrize('with_objectness', [True, False])
def test_offset_undoes_a_shift(shift: float, with_objectness: bool) -> None:
    logits = 3 * torch.randn(2, 4000, generator=torch.Generator().manual_seed(0))
    moved = torch.stack((logits[0], logits[0] + shift))
    same = torch.stack((logits[1], logits[1]))
    offset = score_offset(moved, same) if with_objectness else score_offset(None, moved)
    assert offset == pytest.approx(-shift, abs=1e-4)


def test_noise_alone_needs_no_offset() -> None:
    # Selected by the teacher's score, locations would show that the student is too low.
    generator = torch.Generator().manual_seed(0)
    classes = torch.randn(1, 100_000, generator=generator) + torch.randn(2, 100_000, generator=generator)
    assert abs(score_offset(None, classes)) < 0.02
    chosen = classes.sigmoid()[:, classes[0].sigmoid() > 0.6]
    assert (chosen[1] - chosen[0]).mean() < -0.1


def test_scores_of_almost_zero_get_no_offset() -> None:
    assert score_offset(None, torch.tensor([[-5.0, -4.0], [-9.0, -9.0]])) == 0.0


def test_objectness_of_a_student_returns_to_that_of_its_teacher(repo: Path) -> None:
    student, cfg, images = shipped_detector(repo, 8, weight=dict(init='lsq'), activation=dict(init='lsq'))
    teacher = MODELS.build(cfg.model).eval()
    teacher.load_state_dict(student.state_dict(), strict=False)
    last = [f'bbox_head.convs.{scale}' for scale in range(len(student.bbox_head.convs))]
    biases = [student.get_submodule(name).bias for name in last]
    expected = [bias.detach().clone() for bias in biases]
    groups = [bias.data.view(3, -1) for bias in biases]
    calibration = ScoreCalibration(student, teacher, last)
    # Rounding alone moves the scores a little.
    own = calibration.measure([(images, [])])
    assert abs(own) < 0.3
    for group in groups:
        group[:, 4] -= 1.2
    assert calibration.measure([(images, [])]) - own == pytest.approx(1.2, abs=0.02)
    assert calibration.add(1.2, images, []) == [f'{name}.bias' for name in last]
    for bias, before in zip(biases, expected, strict=True):
        torch.testing.assert_close(bias.detach(), before)
    assert all(quantizer.enabled for _, quantizer in quantizers(student))


def test_classes_move_where_there_is_no_objectness(tiny_cfg: Callable[[str], Any]) -> None:
    detector = MODELS.build(tiny_cfg('retinanet_r18'))
    detector.init_weights()
    student, images = detector.eval(), scenes()
    teacher = copy.deepcopy(student)
    last = ['bbox_head.retina_cls', 'bbox_head.retina_reg']
    calibration = ScoreCalibration(student, teacher, last)
    assert calibration.add(0.5, images, []) == ['bbox_head.retina_cls.bias']
    moved = student.bbox_head.retina_cls.bias - teacher.bbox_head.retina_cls.bias
    torch.testing.assert_close(moved.detach(), torch.full_like(moved, 0.5))
    with pytest.raises(UserError, match='no biases of its last layers move them alone'):
        ScoreCalibration(student, teacher, ['bbox_head.retina_reg']).add(0.5, images, [])


def test_softmax_heads_are_refused(tiny_cfg: Callable[[str], Any]) -> None:
    detector = MODELS.build(tiny_cfg('faster-rcnn_r18'))
    with pytest.raises(UserError, match='scores of FasterRCNN cannot be calibrated'):
        ScoreCalibration(detector, detector, [])
