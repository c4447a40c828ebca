# SPDX-License-Identifier: Apache-2.0
"""Transformers are compared on the teacher's queries, without denoising queries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmdet
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.distillation import FeatureMSELoss, PredictionKLLoss, feature_modules
from mmzsq.qat.paired_forward import (
    NMS_CALLERS,
    TopkReplay,
    TransformerPairedForward,
    build_paired_forward,
    recording_nms,
    replaying_nms,
)
from mmzsq.tasks.detection_task import data_samples, sum_losses

SIZE = (64, 64)
QUERIES = 12
DECODER_LAYERS = 2
TINY = {
    'model.backbone': dict(depth=18, base_channels=8, init_cfg=None, frozen_stages=-1),
    'model.neck.in_channels': [16, 32, 64],
    'model.num_queries': QUERIES,
    'model.encoder.num_layers': 1,
    'model.decoder.num_layers': DECODER_LAYERS,
    'model.bbox_head.num_classes': 3,
    'model.dn_cfg.group_cfg': dict(num_groups=2, num_dn_queries=4),
}


@pytest.fixture
def cfg(tiny_cfg: Callable[[str], Any]) -> Any:
    """Config of a tiny DINO."""
    cfg = Config.fromfile(Path(mmdet.__file__).parent / '.mim/configs/dino/dino-4scale_r50_8xb2-12e_coco.py')
    cfg.merge_from_dict(copy.deepcopy(TINY))
    return cfg.model


@pytest.fixture
def pair(cfg: Any) -> tuple[Any, Any]:
    """A tiny DINO with random weights, and a copy of it."""
    teacher = MODELS.build(copy.deepcopy(cfg)).eval().requires_grad_(False)
    # Until then, the level embedding is uninitialized memory.
    teacher.init_weights()
    with torch.no_grad():
        for parameter in teacher.parameters():
            # The last layer of a new head is zero.
            parameter.add_(0.02 * torch.randn_like(parameter))
    return copy.deepcopy(teacher).requires_grad_(True), teacher


def batch() -> tuple[Tensor, Any]:
    boxes = torch.tensor([[8.0, 8.0, 40.0, 50.0]])
    labels = [InstanceData(bboxes=boxes + shift, labels=torch.tensor([shift])) for shift in (0, 2)]
    return torch.randn(2, 3, *SIZE), data_samples(labels, SIZE, torch.device('cpu'))


def proposing(detector: Any) -> nn.Linear:
    """Parameters of the layer whose scores only choose queries."""
    return detector.bbox_head.cls_branches[detector.decoder.num_layers]


def test_the_student_gets_the_teachers_queries(pair: tuple[Any, Any]) -> None:
    student, teacher = pair
    inputs, samples = batch()
    with torch.no_grad():
        proposing(student).weight.normal_()
    compare = build_paired_forward(student, teacher, ['bbox_head'])
    assert type(compare) is TransformerPairedForward
    compared = compare(inputs, samples, with_losses=False)
    torch.testing.assert_close(compared.student, compared.teacher)
    with torch.no_grad():
        alone = student(inputs, samples, mode='tensor')
    assert not torch.allclose(alone[0][-1], compared.teacher['bbox_head'][DECODER_LAYERS - 1])


def test_query_proposals_are_compared_and_all_layers_are_trained(pair: tuple[Any, Any]) -> None:
    student, teacher = pair
    losses = [PredictionKLLoss(), FeatureMSELoss(normalize=True)]
    taps = {tap for loss in losses for tap in loss.taps(student)}
    assert {'bbox_head', 'bbox_head.cls_branches.2', 'bbox_head.reg_branches.2', 'encoder.layers.0'} <= taps
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    compared = build_paired_forward(student, teacher, taps)(*batch(), with_losses=False)
    torch.stack([loss(compared.student, compared.teacher, student) for loss in losses]).sum().backward()
    lost = [
        name
        for name, parameter in student.named_parameters()
        if parameter.dim() > 1 and (parameter.grad is None or not parameter.grad.any())
    ]
    # Parameters that only denoising reads.
    assert lost == ['dn_query_generator.label_embedding.weight']


def test_the_detection_loss_equals_that_of_training_and_keeps_the_comparison(pair: tuple[Any, Any]) -> None:
    student, teacher = pair
    inputs, samples = batch()
    compare = build_paired_forward(student, teacher, ['bbox_head'])
    plain = compare(inputs, samples, with_losses=False)
    torch.manual_seed(1)
    compared = compare(inputs, samples, with_losses=True)
    torch.testing.assert_close(compared.student, plain.student)
    assert [m.shape for m in compared.student['bbox_head']] == [(2, QUERIES, 3)] * DECODER_LAYERS + [
        (2, QUERIES, 4)
    ] * DECODER_LAYERS
    student.train()
    for module in student.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout | nn.MultiheadAttention):
            module.eval()
    torch.manual_seed(1)
    expected = student.loss(inputs, samples)
    assert any(name.startswith('dn_') for name in expected)
    assert compared.losses.keys() == expected.keys()
    torch.testing.assert_close(sum_losses(compared.losses), sum_losses(expected))


def test_topk_indices_are_recorded_and_replayed() -> None:
    first, second = torch.rand(2, 6), torch.rand(2, 6)
    with TopkReplay() as recorded:
        by_rows, by_columns = torch.topk(first, 2, dim=1), first.topk(k=1, dim=0)
        assert torch.equal(torch.sort(first).values, first.sort().values)
    with TopkReplay(recorded.indices):
        again_rows, again_columns = torch.topk(second, 2, dim=1), second.topk(k=1, dim=0)
    assert torch.equal(again_rows.indices, by_rows.indices)
    assert torch.equal(again_rows.values, second.gather(1, by_rows.indices))
    assert torch.equal(again_columns[0], second.gather(0, by_columns[1]))


def test_the_student_of_ddq_keeps_the_queries_that_the_teacher_keeps() -> None:
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 3.9], [5.0, 5.0, 9.0, 9.0]])
    settings = dict(type='nms', iou_threshold=0.5)
    originals = [caller.batched_nms for caller in NMS_CALLERS]
    with recording_nms() as kept:
        for caller in NMS_CALLERS:
            caller.batched_nms(boxes, torch.tensor([0.9, 0.5, 0.7]), torch.ones(3), settings)
    assert [indices.tolist() for _, indices in kept] == [[0, 2]] * 2
    with replaying_nms(kept):
        for caller in NMS_CALLERS:
            _, indices = caller.batched_nms(boxes, torch.tensor([0.1, 0.5, 0.7]), torch.ones(3), settings)
            assert indices.tolist() == [0, 2]
    assert [caller.batched_nms for caller in NMS_CALLERS] == originals


def test_parts_of_a_transformer_are_features(pair: tuple[Any, Any]) -> None:
    names = feature_modules(pair[0])
    assert [name for name in names if not name.startswith('backbone.')] == ['neck', 'encoder.layers.0']
