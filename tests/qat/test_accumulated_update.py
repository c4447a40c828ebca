# SPDX-License-Identifier: Apache-2.0
"""An update in parts, accumulated batches or processes, has the gradient of one batch with all images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from update_gradients import DISTILLED, OWN_LOSS, assert_equal, build, gradients

from mmzsq.config.presets import preset_section
from mmzsq.qat import ZeroShotDetector
from mmzsq.update_parts import UpdateParts, row_shares, update_mean

PAPER = preset_section('paper', {'quantizer': {'w_bits': 4}})

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
