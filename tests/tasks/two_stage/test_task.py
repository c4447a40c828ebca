# SPDX-License-Identifier: Apache-2.0
"""The whole loss: it can be captured in a CUDA graph, its gradient is repeatable, and unsupported detectors say why."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from mmzsq.errors import UserError
from mmzsq.models.max_iou_assigner import SyncFreeMaxIoUAssigner, replace_max_iou_assigners
from mmzsq.synthesis import BNStatisticsPrior, PatchSimilarityPrior, Synthesizer, TotalVariationPrior, select_priors
from mmzsq.synthesis.acceleration import Acceleration
from mmzsq.synthesis.optimization_step import OptimizationStep
from mmzsq.tasks import DetectionTask, TwoStageTask, build_detection_task
from mmzsq.tasks.two_stage import unsupported_reason

Build = Callable[..., nn.Module]
SIZE = (96, 128)
SWIN = dict(type='SwinTransformer', embed_dims=8, depths=[1, 2, 1, 1], num_heads=[1, 1, 2, 2], window_size=4)
FASTER = '_base_/models/faster-rcnn_r50_fpn.py'
NO_FIXED_ORDER = (
    'Gather',
    'Scatter',
    'IndexAdd',
    'IndexSelect',
    'Embedding',
    'Grid',
    'RoIAlign',
    'RoiAlign',
    'Bilinear',
)
"""Parts of the names of backward functions whose summation order on a GPU is not fixed."""


def to_fake_gpu(task: TwoStageTask, samples: Any, mode: FakeTensorMode) -> None:
    """Replace all tensors by fake CUDA tensors without data, so that reading a value raises. Needs no GPU."""

    def fake(value: Any) -> Any:
        with mode:
            if isinstance(value, torch.Tensor):
                return torch.empty(value.shape, dtype=value.dtype, device='cuda')
            return value

    for module in task.detector.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = nn.Parameter(fake(tensor), False) if tensors is module._parameters else fake(tensor)
    for holder, names in (
        (task, ('_mean', '_std', '_shift', '_scale', '_coder', '_rpn_coder')),
        (samples, ('targets', 'masks', 'filler', 'precomputed')),
    ):
        for name in names:
            setattr(holder, name, tree_map(fake, getattr(holder, name)))


def make_step(task: TwoStageTask, samples: Any, images: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Build a synthesis step as it runs on a GPU, with fast layers, cutout and priors, but without Adam."""
    monkeypatch.setattr(torch.optim, 'Adam', lambda images, **options: torch.optim.SGD(images, lr=0.1))
    monkeypatch.setattr(torch.cuda, 'Stream', lambda: None)
    monkeypatch.setattr(task, 'data_samples', lambda *args: samples)
    # Triton's kernels and the operator that computes BatchNorm statistics need a real GPU.
    for module in ('priors', 'acceleration'):
        monkeypatch.setattr(f'mmzsq.synthesis.{module}.HAS_TRITON', False)
    kinds = (PatchSimilarityPrior(), TotalVariationPrior(), *(() if images.is_cuda else (BNStatisticsPrior(),)))
    priors = select_priors(kinds, task.detector, require_features=False)
    cutout = dict(probability=0.5, area=(0.02, 0.2), ratio=(0.3, 3.3), value=0.0)
    synthesizer = Synthesizer(task, priors, cutout=cutout)
    synthesizer.acceleration = Acceleration(task.detector, torch.bfloat16 if images.is_cuda else torch.float32)
    for prior in priors:
        prior.attach(task.detector)
    return OptimizationStep(synthesizer, images, [])


@pytest.mark.parametrize('backbone', ['resnet', 'swin'])
def test_a_step_copies_nothing_from_the_host(
    build: Build, labels: list[InstanceData], backbone: str, no_copies: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step in bf16 up to the sum of the losses, which is the part that runs without a GPU."""
    monkeypatch.setattr('torch.cuda.amp.common.amp_definitely_not_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda: True)
    task = TwoStageTask(build(backbone=SWIN) if backbone == 'swin' else build())
    samples = task.data_samples(labels, SIZE)
    task.loss(torch.rand(4, 3, *SIZE), samples)
    mode = FakeTensorMode()
    to_fake_gpu(task, samples, mode)
    monkeypatch.setattr(torch.Tensor, 'backward', lambda total: None)
    with mode:
        step = make_step(task, samples, torch.rand(4, 3, *SIZE, device='cuda'), monkeypatch)
        with no_copies:
            step._compute()
    assert len(step.losses) == (3 if backbone == 'swin' else 2)
    assert all(loss.shape == () and loss.device.type == 'cuda' for loss in step.losses.values())
    assert not no_copies.copies


@pytest.mark.parametrize('backbone', ['resnet', 'swin'])
def test_a_step_never_waits_for_a_value(
    build: Build, labels: list[InstanceData], backbone: str, no_values: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole step, including the backward."""
    task = TwoStageTask(build(backbone=SWIN) if backbone == 'swin' else build())
    samples = task.data_samples(labels, SIZE)
    step = make_step(task, samples, torch.rand(4, 3, *SIZE), monkeypatch)
    step._compute()
    before = step.images.detach().clone()
    with no_values():
        step._compute()
    assert len(step.losses) == 3
    assert not torch.equal(step.images, before)


def test_only_images_get_a_gradient_with_a_fixed_summation_order(
    task: TwoStageTask, labels: list[InstanceData]
) -> None:
    images = torch.rand(4, 3, *SIZE, requires_grad=True)
    loss = task.loss(images, task.data_samples(labels, SIZE))
    names, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in names:
            names.add(node)
            nodes += [parent for parent, _ in node.next_functions]
    found = {node.name() for node in names}
    assert 'IndexBackward0' in found
    assert not [name for name in found if any(part in name for part in NO_FIXED_ORDER)]
    loss.backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    assert not any(parameter.requires_grad for parameter in task.detector.parameters())


def test_a_seed_fixes_the_loss_and_its_gradient(task: TwoStageTask, labels: list[InstanceData]) -> None:
    images = torch.rand(4, 3, *SIZE, requires_grad=True)
    samples = task.data_samples(labels, SIZE)

    def step(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(seed)
        loss = task.loss(images, samples)
        return loss.detach(), torch.autograd.grad(loss, images)[0]

    first, second, other = step(1), step(1), step(2)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], other[0])


def test_in_16_bits_the_loss_is_the_same_up_to_rounding(task: TwoStageTask, labels: list[InstanceData]) -> None:
    images = torch.rand(4, 3, *SIZE, requires_grad=True)
    samples = task.data_samples(labels, SIZE)
    # Rounding can change the order of proposals and thus the boxes, so only labels and their copies are used.
    task.proposals, proposals = 1, task.proposals
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            losses.append(task.loss(images, samples))
    task.proposals = proposals
    assert losses[1].dtype == torch.float32
    assert losses[1] != losses[0]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.03)
    assert torch.autograd.grad(losses[1], images)[0].isfinite().all()


def test_descending_the_loss_descends_mmdetections_own(build: Build, labels: list[InstanceData]) -> None:
    detector = build()
    task, own = TwoStageTask(detector), DetectionTask(detector)
    images = torch.rand(4, 3, *SIZE)
    samples, own_samples = task.data_samples(labels, SIZE), own.data_samples(labels, SIZE)

    def mmdetections() -> float:
        with torch.no_grad():
            return float(torch.stack([own.loss(images, own_samples) for _ in range(5)]).mean())

    before = mmdetections()
    optimizer = torch.optim.Adam([images.requires_grad_()], lr=0.02)
    for _ in range(15):
        optimizer.zero_grad()
        task.loss(images, samples).backward()
        optimizer.step()
    assert mmdetections() < 0.9 * before


def test_a_detector_without_masks_needs_no_masks(build: Build, labels: list[InstanceData]) -> None:
    task = build_detection_task(build(FASTER))
    assert isinstance(task, TwoStageTask)
    samples = task.data_samples([InstanceData(bboxes=e.bboxes, labels=e.labels) for e in labels], SIZE)
    assert samples.masks is None
    assert task.loss(torch.rand(4, 3, *SIZE), samples).isfinite()


def test_labels_without_masks_are_rejected_for_a_mask_head(task: TwoStageTask, labels: list[InstanceData]) -> None:
    with pytest.raises(UserError, match='MaskRCNN has a mask head, but the labels have no masks'):
        task.data_samples([InstanceData(bboxes=e.bboxes, labels=e.labels) for e in labels], SIZE)


@pytest.mark.parametrize(
    ('base', 'changes', 'reason'),
    [
        (FASTER, dict(rpn_head__reg_decoded_bbox=True), 'rpn_head.reg_decoded_bbox is True'),
        (
            FASTER,
            dict(roi_head__bbox_head__loss_bbox=dict(_delete_=True, type='GIoULoss')),
            'roi_head.bbox_head.loss_bbox is GIoULoss, not L1Loss or SmoothL1Loss',
        ),
        (FASTER, dict(train_cfg__rcnn__sampler__type='OHEMSampler'), 'roi_head.bbox_sampler is OHEMSampler'),
        (FASTER, dict(train_cfg__rpn_proposal__nms__type='soft_nms'), 'suppressed by soft_nms'),
        (
            FASTER,
            dict(roi_head__bbox_head__loss_cls__class_weight=[1.0, 1.0, 1.0, 0.5]),
            'roi_head.bbox_head.loss_cls.class_weight',
        ),
        ('_base_/models/cascade-rcnn_r50_fpn.py', {}, 'CascadeRCNN is not FasterRCNN or MaskRCNN'),
        ('_base_/models/mask-rcnn_r50_fpn.py', dict(roi_head__mask_head__upsample_cfg__type='bilinear'), 'bilinear'),
        ('_base_/models/mask-rcnn_r50_fpn.py', dict(train_cfg__rcnn__soft_mask_target=True), 'mask targets are soft'),
    ],
)
def test_an_unsupported_detector_uses_its_own_loss_and_says_why(
    build: Build, base: str, changes: dict[str, Any], reason: str
) -> None:
    task = build_detection_task(build(base, **changes))
    assert type(task) is DetectionTask
    assert task.note is not None
    assert reason in task.note


def test_a_subclass_of_a_component_is_unsupported(build: Build) -> None:
    detector = build(FASTER)
    assert unsupported_reason(detector) is None
    # The same assignment without synchronization, which configs may request.
    replace_max_iou_assigners(detector)
    assert type(detector.roi_head.bbox_assigner) is SyncFreeMaxIoUAssigner
    assert unsupported_reason(detector) is None
    detector.rpn_head.__class__ = type('OtherRPNHead', (type(detector.rpn_head),), {})
    assert unsupported_reason(detector) == 'its rpn_head is OtherRPNHead, not RPNHead'


def test_a_yolov5_has_no_note(repo: Path) -> None:
    model = Config.fromfile(repo / 'configs/shapes/yolov5-p_shapes.py').model
    with DefaultScope.overwrite_default_scope('mmdet'):
        task = build_detection_task(MODELS.build(model))
    assert not isinstance(task, TwoStageTask)
    assert task.note is None
