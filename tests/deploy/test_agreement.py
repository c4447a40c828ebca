# SPDX-License-Identifier: Apache-2.0
"""Detections of PyTorch are computed once for all runtimes, and noise is drawn only while it decides the check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import nn

from mmzsq.deploy.agreement import NOISE_DRAWS, References, agreement, detect
from mmzsq.deploy.verify import VerifyReport, _compare_detections

SAMPLES = [dict(inputs=torch.zeros(1), data_samples=DetDataSample()) for _ in range(2)]


def instances(*boxes: tuple[float, float, float, float], label: int = 0) -> InstanceData:
    """Return boxes of one class with scores of 0.9."""
    found = InstanceData()
    found.bboxes = torch.tensor(boxes).reshape(-1, 4)
    found.scores = torch.full((len(boxes),), 0.9)
    found.labels = torch.full((len(boxes),), label)
    return found


class Detector(nn.Module):
    """Finds one box in each image, and counts the images of all its copies."""

    calls = 0

    def test_step(self, data: Any) -> Any:
        """Return the box."""
        Detector.calls += len(data['inputs'])
        sample = DetDataSample()
        sample.pred_instances = instances((0, 0, 10, 10))
        return [sample]


@pytest.fixture
def references() -> References:
    Detector.calls = 0
    return References(Detector(), SAMPLES)


def test_pytorch_runs_once_for_two_runtimes(references: References) -> None:
    found = detect(Detector(), SAMPLES)
    Detector.calls = 0
    for runtime in ('openvino', 'onnxruntime'):
        report = VerifyReport(runtime)
        _compare_detections(report, references, found)
        assert (report.agreement, report.self_agreement, report.detections, report.images) == (1.0, 1.0, 4, 2)
    # The detector itself and one twin.
    assert Detector.calls == 2 * len(SAMPLES)


def test_all_noise_is_drawn_before_a_file_fails(references: References) -> None:
    report = VerifyReport('openvino')
    _compare_detections(report, references, [instances((50, 50, 60, 60))] * 2)
    assert (report.agreement, report.self_agreement, report.agrees) == (0.0, 1.0, False)
    assert Detector.calls == (1 + 1 + NOISE_DRAWS) * len(SAMPLES)


def test_agreement_pairs_boxes_of_one_class() -> None:
    boxes = ((0, 0, 10, 10), (20, 20, 30, 30), (40, 40, 50, 50))
    # IoU 0.8; 0.6; another class.
    other = [instances((0, 0, 10, 8), (20, 20, 30, 26)), instances(boxes[2], label=1)]
    assert agreement([instances(*boxes[:2]), instances(boxes[2])], other) == pytest.approx(2 * 1 / 6)
    assert agreement([instances()], [instances()]) == 1.0
