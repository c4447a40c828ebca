# SPDX-License-Identifier: Apache-2.0
"""Switching between train and eval mode changes the outputs of heads, but not BatchNorm and random dropping."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mmdet
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from torch import nn

from mmzsq.errors import UserError
from mmzsq.models.train_eval_modes import eval_mode, frozen_train_mode, single_process
from mmzsq.tasks import DetectionTask

CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'
TINY = {
    'model.backbone': dict(depth=18, base_channels=8, init_cfg=None),
    'model.neck': dict(in_channels=[8, 16, 32, 64], out_channels=32),
    'model.bbox_head': dict(in_channels=32, feat_channels=32, stacked_convs=1, num_classes=3),
}
SIZE = (128, 128)


@pytest.fixture
def build(tiny_cfg: Callable[[str], Any]) -> Callable[[str], Any]:
    """Function that builds a tiny detector from one of MMDetection's configs."""

    def build(path: str) -> Any:
        cfg = Config.fromfile(CONFIGS / path)
        cfg.merge_from_dict(TINY)
        return MODELS.build(cfg.model)

    return build


class Net(nn.Module):
    """One module of each kind, all in train mode except a frozen stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
        self.bn = nn.BatchNorm2d(3)
        self.drop = nn.Dropout()
        self.attention = nn.MultiheadAttention(4, 1, dropout=0.5)
        self.head = nn.Conv2d(3, 3, 1)


def modes(net: nn.Module) -> dict[str, bool]:
    return {name: module.training for name, module in net.named_modules()}


def test_batch_norm_and_random_modules_keep_their_mode() -> None:
    net = Net()
    before = modes(net)
    with eval_mode(net):
        assert [name for name, training in modes(net).items() if training] == ['bn']
    assert modes(net) == before
    with eval_mode(net, keep=()):
        assert not any(modes(net).values())
    assert modes(net) == before
    net.eval()
    with frozen_train_mode(net):
        excepted = {'stage.1', 'bn', 'drop', 'attention'}
        assert {name for name, training in modes(net).items() if not training} == excepted
    assert not any(modes(net).values())


def test_single_process_affects_only_the_calling_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: True)
    with ThreadPoolExecutor(1) as other, single_process():
        assert not torch.distributed.is_initialized()
        assert other.submit(torch.distributed.is_initialized).result()
    assert torch.distributed.is_initialized()


def test_the_message_hub_reports_the_last_epoch_inside_the_block() -> None:
    hub = MessageHub.get_current_instance()
    hub.pop_info('epoch')
    seen: list[int] = []

    def fail() -> None:
        seen.append(hub.get_info('epoch'))
        raise ZeroDivisionError

    for epoch in (None, 3):
        if epoch is not None:
            hub.update_info('epoch', epoch)
        with pytest.raises(ZeroDivisionError), frozen_train_mode(nn.Linear(1, 1)):
            fail()
        assert seen.pop() > 1000
        assert hub.get_info('epoch') == epoch
    hub.pop_info('epoch')


LABELS = [
    InstanceData(bboxes=torch.tensor([[8.0, 8.0, 90.0, 100.0]]), labels=torch.tensor([1])),
    InstanceData(bboxes=torch.tensor([[20.0, 30.0, 60.0, 70.0]]), labels=torch.tensor([2])),
]


@pytest.mark.parametrize(
    'path',
    ['fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco.py', 'vfnet/vfnet_r50_fpn_1x_coco.py'],
)
def test_the_loss_of_a_task_is_that_of_training(build: Callable[[str], Any], path: str) -> None:
    """In eval mode, FCOS encodes boxes differently and VFNet returns fewer maps."""
    detector = build(path)
    task = DetectionTask(detector)
    images = torch.rand(2, 3, *SIZE)
    samples = task.data_samples(LABELS, SIZE)
    found = task.loss(images, samples)
    assert not any(module.training for module in detector.modules())
    detector.train()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    losses = detector.loss(task.normalize(images), samples)
    expected = sum(value.mean() for losses_of in losses.values() for value in torch.as_tensor(losses_of).reshape(1, -1))
    torch.testing.assert_close(found, expected)


def test_tood_is_past_its_first_epochs(build: Callable[[str], Any]) -> None:
    """Its assigner and class loss are those of a fully trained detector, whatever the student's epoch."""
    detector = build('tood/tood_r50_fpn_1x_coco.py')
    task = DetectionTask(detector)
    assigned: list[Any] = []
    detector.bbox_head.alignment_assigner.assign = lambda *args, **kwargs: assigned.append(args)
    with pytest.raises(AttributeError):
        task.loss(torch.rand(2, 3, *SIZE), task.data_samples(LABELS, SIZE))
    assert assigned


def test_a_loss_that_needs_another_package_names_it(build: Callable[[str], Any]) -> None:
    detector = build('retinanet/retinanet_r50_fpn_1x_coco.py')

    def loss(*_: Any) -> None:
        raise ImportError('Please run "pip install sklearn" to install sklearn first.')

    detector.loss = loss
    task = DetectionTask(detector)
    with pytest.raises(UserError, match='loss of RetinaNet needs another package: .*sklearn'):
        task.loss(torch.rand(2, 3, *SIZE), task.data_samples(LABELS, SIZE))
