# SPDX-License-Identifier: Apache-2.0
"""Gradients of one update from batches of given sizes, for tests that compare them with those of one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from mmdet.registry import MODELS
from mmengine.optim import OptimWrapper
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.config.presets import preset_section
from mmzsq.engine.distributed import AveragingDataParallel
from mmzsq.qat import ZeroShotDetector
from mmzsq.quantization import calibrating
from mmzsq.tasks.detection_task import data_samples, needs_masks

SIZE = (64, 96)
IMAGES = 4
DISTILLED = preset_section('default', {'quantizer': {'w_bits': 4}})

Loss = dict[str, Any]

OWN_LOSS: Loss = dict(detection_weight=1.0, losses=[])
"""The detector's own loss alone, whose divisors and regions depend on the student."""


def vary(detector: nn.Module) -> None:
    """Initialize a detector, and give its outputs variance."""
    detector.init_weights()
    # Random maps hardly vary: biases of classes near 0 give each image its own number of soft objects.
    with torch.no_grad():
        for name, weight in detector.named_parameters():
            if 'head' in name:
                weight.add_(0.3 * torch.randn_like(weight))
            elif not weight.any() and name.endswith('.weight'):
                # The last BatchNorm of a residual branch, through which no gradient would pass.
                weight.fill_(0.5)


def build(
    cfg: Any, distillation: Loss, folder: Path, initialize: Callable[[nn.Module], None] = vary
) -> ZeroShotDetector:
    """A student of 4 bits with steps of its own, in fp64: rounding errors then do not move values to other levels."""
    torch.manual_seed(0)
    take_all(cfg)
    detector = MODELS.build(copy.deepcopy(cfg))
    initialize(detector)
    torch.save({'state_dict': detector.state_dict()}, folder / 'teacher.pth')
    quantizer = dict(DISTILLED['quantizer'], w_bits=4, a_bits=4)
    model = ZeroShotDetector(cfg, quantizer, distillation, teacher=str(folder / 'teacher.pth'))
    model.init_weights()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.student.parameters():
            weight.mul_(1 + 0.1 * torch.randn_like(weight))
    inputs = model.data_preprocessor(images())['inputs']
    with torch.no_grad(), calibrating(model.eval().student):
        # Some heads take masks of the labeled objects alone.
        samples = data_samples([labels(image) for image in range(IMAGES)], SIZE, torch.device('cpu'))
        model.student(inputs, samples, mode='tensor')
    return model.double().train()


def labels(image: int, with_masks: bool = True) -> InstanceData:
    """Between none and three objects of an image."""
    generator = torch.Generator().manual_seed(image)
    corners = torch.rand(image % 4, 2, 2, generator=generator).sort(1).values * torch.tensor(SIZE[::-1])
    found = InstanceData(bboxes=corners.flatten(1), labels=torch.arange(image % 4) % 3)
    if not with_masks:
        # Some heads take the masks of objects as their shapes.
        return found
    masks = torch.zeros(len(corners), *SIZE, dtype=torch.uint8)
    for mask, ((left, top), (right, bottom)) in zip(masks, corners.int().tolist(), strict=True):
        mask[top : bottom + 1, left : right + 1] = 1
    found.masks = masks
    return found


def images(first: int = 0, count: int = IMAGES, masks: bool = True) -> dict[str, Any]:
    """Images of very different contrast, so that they have very different numbers of soft objects."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(IMAGES, 3, *SIZE, generator=generator)
    pixels = (127 + (noise - 0.5) * torch.tensor([20.0, 60, 130, 255]).view(-1, 1, 1, 1)).byte()
    chosen = range(first, first + count)
    return dict(
        inputs=[pixels[image] for image in chosen],
        data_samples=data_samples([labels(image, masks) for image in chosen], SIZE, torch.device('cpu')),
    )


def gradients(model: ZeroShotDetector, parts: list[int], first: int = 0, **options: Any) -> dict[str, Tensor]:
    """The gradient of one update from batches of the given sizes, by name, and the logged losses."""
    model = copy.deepcopy(model)
    wrapper = OptimWrapper(
        torch.optim.SGD(model.parameters(), lr=0.0), accumulative_counts=max(len(parts), 1), **options
    )
    found: dict[str, Tensor] = {}
    step, zero = wrapper.step, wrapper.zero_grad

    def look() -> None:
        step()
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    wrapper.step = look  # type: ignore[method-assign]
    wrapped = AveragingDataParallel(model) if dist.is_initialized() else model
    for count in parts:
        assert not found
        batch = images(first, count, needs_masks(model.student))
        log = wrapped.train_step(batch, wrapper)
        first += count
        if not found:
            assert log == {}
    zero()
    return {**found, **{f'log {name}': value for name, value in log.items()}}


def assert_equal(parts: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """Compare two results of :func:`gradients`: most parameters must have a gradient, and all the same one."""
    assert parts.keys() == whole.keys()
    assert sum('_quantizer.' in name for name in whole) > 20
    largest = max(float(grad.abs().max()) for name, grad in whole.items() if not name.startswith('log '))
    assert sum(float(grad.abs().max()) > 1e-5 * largest for grad in whole.values()) > 0.6 * len(whole)
    for name, grad in whole.items():
        # Losses are computed in fp32.
        tolerance = 1e-5 * float(grad.abs().max()) + 1e-9 * largest
        torch.testing.assert_close(
            parts[name], grad, rtol=1e-4, atol=tolerance, msg=lambda text, name=name: f'{name}: {text}'
        )


def take_all(cfg: Any) -> None:
    """Let samplers take all anchors and regions. A random choice of them would differ between parts."""
    if isinstance(cfg, dict):
        if str(cfg.get('type')).endswith('RandomSampler'):
            cfg.update(num=10**6, pos_fraction=1.0, neg_pos_ub=-1)
        for name, value in cfg.items():
            if name == 'rpn_proposal':
                value.update(nms_pre=40, max_per_img=20)
            else:
                take_all(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            take_all(value)
