# SPDX-License-Identifier: Apache-2.0
"""An update in parts, accumulated batches or processes, has the gradient of one batch with all images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.optim import OptimWrapper
from mmengine.structures import InstanceData
from torch import Tensor

from mmzsq.config.presets import preset_section
from mmzsq.engine.distributed import AveragingDataParallel
from mmzsq.qat import ZeroShotDetector
from mmzsq.quantization import calibrating
from mmzsq.tasks.detection_task import data_samples
from mmzsq.update_parts import UpdateParts, row_shares, update_mean

SIZE = (64, 96)
IMAGES = 4
DISTILLED = preset_section('default', {'quantizer': {'w_bits': 4}})
PAPER = preset_section('paper', {'quantizer': {'w_bits': 4}})

Loss = dict[str, Any]


def build(cfg: Any, distillation: Loss, folder: Path) -> ZeroShotDetector:
    """A student of 4 bits with steps of its own, in fp64: rounding errors then do not move values to other levels."""
    torch.manual_seed(0)
    take_all(cfg)
    detector = MODELS.build(copy.deepcopy(cfg))
    detector.init_weights()
    # Random maps hardly vary: biases of classes near 0 give each image its own number of soft objects.
    with torch.no_grad():
        for name, weight in detector.named_parameters():
            if 'head' in name:
                weight.add_(0.3 * torch.randn_like(weight))
            elif not weight.any() and name.endswith('.weight'):
                # The last BatchNorm of a residual branch, through which no gradient would pass.
                weight.fill_(0.5)
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
        model.student(inputs, data_samples([labels(0)] * IMAGES, SIZE, torch.device('cpu')), mode='tensor')
    return model.double().train()


def labels(image: int) -> InstanceData:
    """Between none and three objects of an image."""
    generator = torch.Generator().manual_seed(image)
    corners = torch.rand(image % 4, 2, 2, generator=generator).sort(1).values * torch.tensor(SIZE[::-1])
    masks = torch.zeros(len(corners), *SIZE, dtype=torch.uint8)
    for mask, ((left, top), (right, bottom)) in zip(masks, corners.int().tolist(), strict=True):
        mask[top : bottom + 1, left : right + 1] = 1
    return InstanceData(bboxes=corners.flatten(1), labels=torch.arange(image % 4) % 3, masks=masks)


def images(first: int = 0, count: int = IMAGES) -> dict[str, Any]:
    """Images of very different contrast, so that they have very different numbers of soft objects."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(IMAGES, 3, *SIZE, generator=generator)
    pixels = (127 + (noise - 0.5) * torch.tensor([20.0, 60, 130, 255]).view(-1, 1, 1, 1)).byte()
    chosen = range(first, first + count)
    return dict(
        inputs=[pixels[image] for image in chosen],
        data_samples=data_samples([labels(image) for image in chosen], SIZE, torch.device('cpu')),
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
        batch = images(first, count)
        log = wrapped.train_step(batch, wrapper)
        first += count
        if not found:
            assert log == {}
    zero()
    return {**found, **{f'log {name}': value for name, value in log.items()}}


def assert_equal(parts: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
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


OWN_LOSS = dict(detection_weight=1.0, losses=[])
"""The detector's own loss alone, whose divisors and regions depend on the student."""

FAMILIES = {
    # Objectness, classes and boxes by location, and features.
    'yolov5': DISTILLED['distillation'],
    # The paper's: raw maps, features, and the detector's own loss.
    'yolov5 paper': PAPER['distillation'],
    # Classes and boxes by location.
    'retinanet_r18': DISTILLED['distillation'],
    'retinanet_r18 own': OWN_LOSS,
    # Proposals, regions and masks.
    'mask-rcnn_r18': DISTILLED['distillation'],
    # With regions of the teacher, and of the student for its own loss.
    'mask-rcnn_r18 both': dict(DISTILLED['distillation'], detection_weight=1.0),
    'faster-rcnn_r18 own': OWN_LOSS,
    # Stages of a cascade.
    'cascade-rcnn_r18': DISTILLED['distillation'],
    'cascade-rcnn_r18 own': OWN_LOSS,
}


def take_all(cfg: Any) -> None:
    """Let a two-stage detector take all anchors and regions. A random choice of them would differ between parts."""
    if 'rpn_head' not in cfg:
        return
    stages = cfg.train_cfg.rcnn if isinstance(cfg.train_cfg.rcnn, list) else [cfg.train_cfg.rcnn]
    for part in (cfg.train_cfg.rpn, *stages):
        part.sampler.update(num=10**6, pos_fraction=1.0)
    cfg.train_cfg.rpn_proposal.update(nms_pre=40, max_per_img=20)


@pytest.fixture
def make(tiny_cfg: Callable[[str], Any], tmp_path: Path) -> Callable[[str], ZeroShotDetector]:
    return lambda name: build(tiny_cfg(name.split()[0]), FAMILIES[name], tmp_path)


@pytest.mark.parametrize('name', FAMILIES)
def test_accumulated_batches_have_the_gradient_of_one_large_batch(make: Any, name: str) -> None:
    """Weights, biases, and the steps and zero points of every quantizer; also with batches of different sizes."""
    model = make(name)
    whole = gradients(model, [4])
    assert_equal(gradients(model, [2, 2]), whole)
    if name.startswith('yolov5'):
        assert_equal(gradients(model, [1, 1, 1, 1]), whole)
        assert_equal(gradients(model, [3, 1]), whole)


def run_process(rank: int, folder: str, cfgs: dict[str, Any]) -> None:
    """Save the gradients of updates of two processes: with one batch each, and with two each."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    torch.set_num_threads(1)
    register_all_modules()
    own = Path(folder, str(rank))
    own.mkdir()
    for name, cfg in cfgs.items():
        model = build(ConfigDict(cfg), FAMILIES[name], own)
        found = [gradients(model, parts, 2 * rank) for parts in ([2], [1, 1])]
        # Each process logs its own losses, which average to those of the large batch.
        for update in found:
            for key in [key for key in update if key.startswith('log ')]:
                dist.all_reduce(update[key])
                update[key] /= 2
        torch.save(found, f'{folder}/{name}_{rank}.pth')
    dist.destroy_process_group()


SHARED = ('yolov5', 'yolov5 paper', 'mask-rcnn_r18 both')


def test_two_processes_have_the_gradient_of_one_large_batch(
    make: Any, tiny_cfg: Callable[[str], Any], tmp_path: Path
) -> None:
    """With one batch in each process, and with two."""
    wholes = {name: gradients(make(name), [4]) for name in SHARED}
    cfgs = {name: tiny_cfg(name.split()[0]).to_dict() for name in SHARED}
    torch.multiprocessing.spawn(run_process, (str(tmp_path), cfgs), nprocs=2)
    for name, whole in wholes.items():
        ranks = [torch.load(tmp_path / f'{name}_{rank}.pth') for rank in (0, 1)]
        for update in range(2):
            assert_equal(ranks[0][update], whole)
            assert all(torch.equal(ranks[0][update][key], ranks[1][update][key]) for key in whole)


def test_clipping_sees_the_gradient_of_the_whole_update(make: Any) -> None:
    model = make('yolov5')
    whole = gradients(model, [4], clip_grad=dict(max_norm=0.01))
    total = sum(float(grad.square().sum()) for name, grad in whole.items() if not name.startswith('log ')) ** 0.5
    assert total == pytest.approx(0.01, rel=1e-3)
    assert_equal(gradients(model, [2, 2], clip_grad=dict(max_norm=0.01)), whole)


def test_means_cover_all_parts_and_are_used_in_order() -> None:
    update = UpdateParts(2)
    for part in (1.0, 3.0):
        with update.recording():
            # While recording, every part sees its own value; the record survives changes in place.
            assert update_mean(torch.tensor(part)).clamp_(min=2.0) == max(part, 2.0)
            update_mean(torch.tensor([part, part * part]))
    for _ in range(2):
        with update.replaying():
            assert update_mean(torch.tensor(0.0)).clamp_(max=1.0) == 1.0
            assert update_mean(torch.zeros(2)).tolist() == [2.0, 5.0]
    with pytest.raises(RuntimeError, match='2 divisors were recorded, but 1 are used'), update.replaying():
        update_mean(torch.tensor(0.0))
    # Outside of an update, one process has one part.
    assert update_mean(torch.tensor(7.0)) == 7.0
    assert row_shares([3], torch.device('cpu')) is None
