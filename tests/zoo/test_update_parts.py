# SPDX-License-Identifier: Apache-2.0
"""An update in parts has the gradient of one batch for each detector's own loss. ``make test-zoo`` checks all of them.

A few detectors, which form divisors in different ways, are checked with every change.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from families import DENSE, MASK_QUERIES, MASKS, MULTI_STAGE, TRANSFORMERS, Family
from harness import zoo_config
from mmdet.utils import register_all_modules
from torch import Tensor, nn
from update_gradients import OWN_LOSS, build, gradients

from mmzsq.qat import ZeroShotDetector

IN_CI = ('PAA', 'YOLACT')
"""Divisors in the arguments of loss modules, and in the head itself."""

LEFT_OUT = {
    'DINO': 'random denoising queries',
    'DDQ': 'random denoising queries',
    'Mask2Former': 'random points',
    'PointRend': 'random points',
    'Grid R-CNN': 'randomly moved regions',
    'PISA': 'ranks of the objects of a batch',
    'VFNet': 'IoUs of an untrained detector add up to less than their minimum',
    'RTMDet': 'IoUs of an untrained detector add up to less than their minimum',
    'RTMDet-Ins': 'IoUs of an untrained detector add up to less than their minimum',
    'SSD': 'needs images of 300 pixels; divides as RetinaNet',
}
"""Detectors whose update in parts differs from one batch, or cannot be compared, and the reason."""

TOLERANCE = 1e-5
"""Some losses and some detectors compute in fp32."""

FAMILIES = [
    family for family in (*DENSE, *MASKS, *TRANSFORMERS, *MASK_QUERIES, *MULTI_STAGE) if family.name not in LEFT_OUT
]
PARAMETERS = [
    pytest.param(family, id=family.name, marks=() if family.name in IN_CI else pytest.mark.zoo) for family in FAMILIES
]


def student(family: Family, folder: Path) -> ZeroShotDetector:
    """A student of a detector that predicts objects, in fp64."""
    register_all_modules()
    cfg = zoo_config(family.config, family.size, family.shrink, family.changes).model
    return build(cfg, OWN_LOSS, folder, finding_objects)


def finding_objects(detector: nn.Module) -> None:
    """Initialize a detector with high scores: divisors that add up scores would be below their minimum otherwise."""
    detector.init_weights()
    with torch.no_grad():
        for name, parameter in detector.named_parameters():
            if 'head' in name and parameter.dim() > 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
            elif 'head' in name and 'cls' in name and name.endswith('bias'):
                parameter.add_(3.0)
            elif 'head' in name and name.endswith('bias'):
                # Sums of quantized products are often 0: without a bias, rounding would decide on which side of a ReLU
                # they lie.
                parameter.add_(0.01 * torch.randn_like(parameter))
            elif not parameter.any() and name.endswith('.weight'):
                # The last BatchNorm of a residual branch, through which no gradient would pass.
                parameter.fill_(0.5)


def updates(model: ZeroShotDetector, *sizes: tuple[list[int], int]) -> list[dict[str, Tensor]]:
    """The gradients of updates from batches of the given sizes that start at the given image."""
    try:
        return [gradients(model, parts, first) for parts, first in sizes]
    except RuntimeError as error:
        # Heads that create tensors of the default type.
        if 'type' not in str(error):
            raise
        return [gradients(model.float(), parts, first) for parts, first in sizes]


def relative_difference(parts: dict[str, Tensor], whole: dict[str, Tensor]) -> float:
    """The distance of two gradients, steps included, relative to the length of the second one."""
    assert parts.keys() == whole.keys()
    names = [name for name in whole if not name.startswith('log ')]
    assert sum('_quantizer.' in name for name in names) > 20
    difference = sum(float((parts[name] - whole[name]).double().square().sum()) for name in names)
    return (difference / sum(float(whole[name].double().square().sum()) for name in names)) ** 0.5


@pytest.mark.parametrize('family', PARAMETERS)
def test_accumulated_batches_have_the_gradient_of_one_batch(family: Family, tmp_path: Path) -> None:
    whole, parts = updates(student(family, tmp_path), ([4], 0), ([2, 2], 0))
    assert relative_difference(parts, whole) < TOLERANCE
    torch.testing.assert_close(parts['log loss'], whole['log loss'], rtol=TOLERANCE, atol=0.0)


def run_process(rank: int, folder: str, family: Family) -> None:
    """Save the gradients of an update of two processes."""
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    torch.set_num_threads(1)
    own = Path(folder, str(rank))
    own.mkdir()
    torch.save(updates(student(family, own), ([2], 2 * rank)), f'{folder}/{rank}.pth')
    dist.destroy_process_group()


@pytest.mark.zoo
@pytest.mark.parametrize('family', FAMILIES, ids=lambda family: family.name)
def test_two_processes_have_the_gradient_of_one_batch(family: Family, tmp_path: Path) -> None:
    (whole,) = updates(student(family, tmp_path), ([4], 0))
    torch.multiprocessing.spawn(run_process, (str(tmp_path), family), nprocs=2)
    (first,), (second,) = (torch.load(tmp_path / f'{rank}.pth') for rank in (0, 1))
    assert relative_difference(first, whole) < TOLERANCE
    assert all(torch.equal(first[name], second[name]) for name in first if not name.startswith('log '))
