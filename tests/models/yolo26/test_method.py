# SPDX-License-Identifier: Apache-2.0
"""The whole method on a tiny YOLO26: synthesis, quantization and a training step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.config.presets import preset_section
from mmzsq.distillation import DensePredictionLoss
from mmzsq.qat import ZeroShotDetector
from mmzsq.quantization import calibrating, quantized_layers
from mmzsq.synthesis import CalibrationSetGenerator
from mmzsq.tasks import build_detection_task
from mmzsq.tasks.padded_task import PaddedTargetsTask

SIZE = (64, 64)
DEFAULT = preset_section('default', {})
QUANTIZER = dict(
    DEFAULT['quantizer'],
    w_bits=4,
    a_bits=8,
    weight=dict(scheme='signed', per_channel=True, init='lsq'),
    activation=dict(scheme='offset', init='lsq'),
)


def samples() -> list[DetDataSample]:
    """Two images with one box each."""
    result = []
    for label in (0, 2):
        meta = dict(img_shape=SIZE, batch_input_shape=SIZE, ori_shape=SIZE, pad_shape=SIZE, scale_factor=(1.0, 1.0))
        sample = DetDataSample(metainfo=meta)
        bboxes = torch.tensor([[8.0, 8.0, 40.0, 50.0]])
        sample.gt_instances = InstanceData(bboxes=bboxes, labels=torch.tensor([label]))
        result.append(sample)
    return result


@pytest.fixture
def student(detector: nn.Module, tiny_model: Callable[[], dict[str, Any]], tmp_path: Path) -> ZeroShotDetector:
    """A calibrated 4-bit student that starts from ``detector``."""
    path = tmp_path / 'teacher.pth'
    torch.save({'state_dict': detector.state_dict(), 'meta': {'dataset_meta': {'classes': ('a', 'b', 'c')}}}, path)
    distillation = dict(copy.deepcopy(DEFAULT['distillation']), detection_weight=0.1)
    model = ZeroShotDetector(tiny_model(), quantizer=QUANTIZER, distillation=distillation, teacher=str(path))
    model.init_weights()
    with torch.no_grad(), calibrating(model.eval().student):
        model.student(torch.rand(2, 3, *SIZE), mode='tensor')
    return model.train()


def test_synthesis_corrects_labels_and_lowers_the_loss(detector: nn.Module) -> None:
    # Biases that make it predict an object about four cells wide nearly everywhere.
    with torch.no_grad():
        for cls_convs in detector.bbox_head.cls_convs:
            cls_convs[2].bias.fill_(0.0)
    task = build_detection_task(detector)
    assert type(task) is PaddedTargetsTask
    options = copy.deepcopy(DEFAULT['synthesis'])
    options.update(
        relabel=dict(image_size=64, iterations=2, batch_size=2),
        refine=None,
        synthesize=dict(image_size=SIZE, iterations=5, batch_size=2, start='previous', lr=0.1),
    )
    sampler = dict(type='mmzsq.AdaptiveLabelSampler', warmup=1, interval=1)
    generator = CalibrationSetGenerator(task, options, sampler, batch_size=2, seed=0)
    losses: list[float] = []
    images, labels, info = generator.make_shard(0, 2, lambda _, progress: losses.append(sum(progress.losses.values())))
    assert images.shape == (2, *SIZE, 3)
    assert sum(map(len, labels)) > 2 and info['relabel']['added'] > 0
    assert losses[-1] < losses[2]


def test_all_layers_learn_and_all_but_the_first_and_last_have_4_bits(student: ZeroShotDetector) -> None:
    kinds = {type(loss) for loss in student.distillation_losses}
    assert DensePredictionLoss in kinds
    layers = dict(quantized_layers(student.student))
    convolutions = {n for n, m in student.student.named_modules() if isinstance(m, nn.Conv2d)}
    assert set(layers) == convolutions
    last = {f'bbox_head.{kind}_convs.{scale}.2' for kind in ('box', 'cls') for scale in range(3)}
    eight = {name for name, layer in layers.items() if layer.weight_quantizer.bits == 8}
    assert eight == {'backbone.stem.conv', *last}

    losses = student(torch.rand(2, 3, *SIZE), samples(), mode='loss')
    torch.stack([value for name, value in losses.items() if 'loss' in name]).sum().backward()
    grads: dict[str, Tensor | None] = {name: p.grad for name, p in student.named_parameters()}
    silent = [name for name, grad in grads.items() if grad is None or not grad.isfinite().all() or not grad.any()]
    assert silent == []
