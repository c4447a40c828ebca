# SPDX-License-Identifier: Apache-2.0
"""The whole loss equals MMDetection's, suits a CUDA graph and takes new labels in place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mmdet
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

from mmzsq.synthesis import BNStatisticsPrior, Synthesizer
from mmzsq.tasks import DetectionTask, OneStageTask, build_detection_task
from mmzsq.tasks.padded_task import PAD_MULTIPLE

Build = Callable[..., nn.Module]
Draw = Callable[..., list[InstanceData]]
SIZE = (96, 128)


def fast_task(detector: nn.Module) -> OneStageTask:
    task = build_detection_task(detector)
    assert isinstance(task, OneStageTask), task.note
    assert task.note is None
    return task


@pytest.fixture
def one_hot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace PyTorch's ``one_hot``, which checks values only on the CPU."""

    def one_hot(labels: Tensor, num_classes: int) -> Tensor:
        return (labels[..., None] == torch.arange(num_classes, device=labels.device)).long()

    monkeypatch.setattr(nn.functional, 'one_hot', one_hot)


def test_loss_and_gradient_of_the_images_are_mmdetections(build: Build, labels: Draw, name: str) -> None:
    detector = build(name)
    task, own = fast_task(detector), DetectionTask(detector)
    wanted = labels((2, 1, 0, 9))
    images = torch.rand(4, 3, *SIZE, requires_grad=True)
    losses = [each.loss(images, each.data_samples(wanted, SIZE)) for each in (task, own)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    gradient, expected = (torch.autograd.grad(loss, images)[0] for loss in losses)
    assert expected.norm() > 0
    assert (gradient - expected).norm() < 1e-4 * expected.norm()
    assert not any(module.training for module in detector.modules())


@pytest.mark.usefixtures('one_hot')
def test_a_step_never_waits_for_a_value_and_labels_change_no_shape(
    build: Build, labels: Draw, name: str, no_values: Any
) -> None:
    task = fast_task(build(name))
    images = torch.rand(4, 3, *SIZE, requires_grad=True)
    samples = task.data_samples(labels((2, 1, 0, 9)), SIZE)
    task.loss(images, samples)
    calls = []
    for wanted in (labels((2, 1, 0, 9)), labels((0, 0, 0, 0)), labels((1, 14, 5, 1), (0.5, 3.0))):
        assert task.update_samples(samples, wanted, SIZE)
        with no_values() as watch:
            torch.autograd.grad(task.loss(images, samples), images)
        calls.append(watch.calls)
    assert len(calls[0]) > 100
    assert calls[0] == calls[1] == calls[2]


@pytest.mark.parametrize('name', ['yolox', 'rtmdet', 'gfl', 'atss'])
def test_a_step_copies_nothing_from_the_host(build: Build, labels: Draw, name: str, no_copies: Any) -> None:
    """Uses fake CUDA tensors without data, so that no GPU is needed."""
    task = fast_task(build(name))
    samples = task.data_samples(labels((2, 1, 0, 3)), SIZE)
    task.loss(torch.rand(4, 3, *SIZE), samples)
    mode = FakeTensorMode()

    def to_fake(value: Any) -> Any:
        with mode:
            return torch.empty(value.shape, dtype=value.dtype, device='cuda') if isinstance(value, Tensor) else value

    for module in task.detector.modules():
        for key, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[key] = nn.Parameter(to_fake(tensor), False)
        module._buffers.update({key: to_fake(tensor) for key, tensor in module._buffers.items()})
    for key in ('_mean', '_std', '_shift', '_scale'):
        setattr(task, key, to_fake(getattr(task, key)))
    samples.targets = tree_map(to_fake, samples.targets)
    with mode:
        images = torch.rand(4, 3, *SIZE, device='cuda')
        with no_copies:
            loss = task.loss(images, samples)
    assert loss.shape == ()
    assert loss.device.type == 'cuda'
    assert not no_copies.copies


def test_new_labels_are_written_in_place(build: Build, labels: Draw, name: str) -> None:
    task = fast_task(build(name))
    images = torch.rand(3, 3, *SIZE)
    samples = task.data_samples(labels((2, 0, 4)), SIZE)
    before = task.loss(images, samples)
    places = [leaf.data_ptr() for leaf in tree_leaves(samples.targets) if isinstance(leaf, Tensor)]
    new = labels((1, 7, 0), seed=1)
    assert task.update_samples(samples, new, SIZE)
    assert [leaf.data_ptr() for leaf in tree_leaves(samples.targets) if isinstance(leaf, Tensor)] == places
    after = task.loss(images, samples)
    assert after != before
    torch.testing.assert_close(after, task.loss(images, task.data_samples(new, SIZE)), rtol=0, atol=0)


@pytest.mark.parametrize('name', ['yolox', 'rtmdet'])
def test_labels_that_do_not_fit_leave_the_samples_unchanged(build: Build, labels: Draw, name: str) -> None:
    task = fast_task(build(name))
    images = torch.rand(2, 3, *SIZE)
    samples = task.data_samples(labels((2, 1)), SIZE)
    assert not task.update_samples(samples, labels((1, 1)), SIZE), 'targets do not exist before the first loss'
    before = task.loss(images, samples)
    assert not task.update_samples(samples, labels((PAD_MULTIPLE + 1, 1)), SIZE)
    assert not task.update_samples(samples, labels((1, 1)), (64, 64))
    assert torch.equal(task.loss(images, samples), before)


def test_in_16_bits_the_loss_is_the_same_up_to_rounding(build: Build, labels: Draw, name: str) -> None:
    task = fast_task(build(name))
    samples = task.data_samples(labels((2, 1, 0, 9)), SIZE)
    images = torch.rand(4, 3, *SIZE, requires_grad=True)
    losses = []
    for enabled in (False, True):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            losses.append(task.loss(images, samples))
    assert losses[1].dtype == torch.float32
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.05)
    assert torch.autograd.grad(losses[1], images)[0].isfinite().all()


def test_synthesis_lowers_mmdetections_own_loss(build: Build, labels: Draw) -> None:
    detector = build('yolox')
    own = DetectionTask(detector)
    task, wanted = fast_task(detector), labels((2, 1))
    start = torch.rand(2, 3, *SIZE)
    images = Synthesizer(task, [BNStatisticsPrior()], lr=0.005).run(wanted, SIZE, 15, 0, start).images
    samples = own.data_samples(wanted, SIZE)
    with torch.no_grad():
        assert own.loss(images, samples) < 0.9 * own.loss(start, samples)


@pytest.mark.parametrize(
    ('name', 'changes', 'reason'),
    [
        ('yolox', dict(bbox_head__loss_bbox__reduction='mean'), "bbox_head.loss_bbox.reduction is 'mean', not 'sum'"),
        ('yolox', dict(bbox_head__loss_cls__class_weight=[1.0, 2.0, 1.0]), 'bbox_head.loss_cls.class_weight'),
        (
            'yolox',
            dict(
                train_cfg__assigner=dict(_delete_=True, type='UniformAssigner', pos_ignore_thr=0.2, neg_ignore_thr=0.7)
            ),
            'UniformAssigner',
        ),
        ('rtmdet', dict(train_cfg__allowed_border=0), 'bbox_head.train_cfg.allowed_border is 0, not -1'),
        ('retinanet', dict(bbox_head__reg_decoded_bbox=True), 'bbox_head.reg_decoded_bbox is True, not False'),
        ('retinanet', dict(bbox_head__loss_cls=dict(_delete_=True, type='GHMC')), 'its bbox_head.loss_cls is GHMC'),
        ('atss', dict(train_cfg=None), 'bbox_head.sampler is NoneType'),
    ],
)
def test_an_unsupported_detector_uses_its_own_loss_and_says_why(
    build: Build, name: str, changes: dict[str, Any], reason: str
) -> None:
    task = build_detection_task(build(name, **changes))
    assert type(task) is DetectionTask
    assert reason in str(task.note)


def test_a_subclass_that_may_compute_another_loss_is_unsupported(build: Build) -> None:
    changes: list[tuple[str, dict[str, Any]]] = [
        ('bbox_head', {'loss_by_feat': lambda self, *args: {}}),
        ('bbox_head.assigner', {}),
    ]
    for path, members in changes:
        detector = build('yolox')
        part = detector.bbox_head if path == 'bbox_head' else detector.bbox_head.assigner
        part.__class__ = type('Other', (type(part),), members)
        task = build_detection_task(detector)
        assert type(task) is DetectionTask
        assert 'Other' in str(task.note)


def test_a_subclass_with_other_layers_and_predictions_has_the_loss_of_its_base(build: Build) -> None:
    detector = build('yolov3')
    members = {'_init_layers': None, 'predict_by_feat': None, 'own_helper': lambda self: None}
    detector.bbox_head.__class__ = type('Other', (type(detector.bbox_head),), members)
    fast_task(detector)


def test_a_detector_that_overrides_its_loss_keeps_it(build: Build) -> None:
    detector = build('yolox')
    detector.__class__ = type('Other', (type(detector),), {'loss': lambda self, *args: {}})
    assert 'Other, since it overrides `loss`' in str(build_detection_task(detector).note)


def test_a_head_without_a_batched_loss_is_named() -> None:
    cfg = Config.fromfile(
        Path(mmdet.__file__).parent / '.mim/configs/centernet/centernet_r18_8xb16-crop512-140e_coco.py'
    )
    with DefaultScope.overwrite_default_scope('mmdet'):
        task = build_detection_task(MODELS.build(cfg.model))
    assert type(task) is DetectionTask
    assert 'since CenterNetHead is not supported' in str(task.note)
