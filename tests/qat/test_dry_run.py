# SPDX-License-Identifier: Apache-2.0
"""The dry run executes every layer of a detector, independently of its weights."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from mmzsq.errors import UserError
from mmzsq.mmcv_ops.torchvision_ops import TorchvisionOps
from mmzsq.qat import ZeroShotDetector
from mmzsq.qat.dry_run import dry_run, dry_run_size
from mmzsq.quantization import QuantizationConfig, QuantizationReport, prepare

LAST = {
    'faster-rcnn_r18': {
        'rpn_head.rpn_cls',
        'rpn_head.rpn_reg',
        'roi_head.bbox_head.fc_cls',
        'roi_head.bbox_head.fc_reg',
    }
}
LAST['mask-rcnn_r18'] = LAST['mask-rcnn_swin'] = LAST['faster-rcnn_r18'] | {'roi_head.mask_head.conv_logits'}
FIRST = {
    'faster-rcnn_r18': 'backbone.conv1',
    'mask-rcnn_r18': 'backbone.conv1',
    'mask-rcnn_swin': 'backbone.patch_embed.projection',
}


def _report(detector: nn.Module) -> QuantizationReport:
    config = QuantizationConfig.from_dict(dict(w_bits=4, a_bits=4))
    return prepare(detector, config, run=lambda: dry_run(detector))


@pytest.mark.parametrize('name', LAST)
def test_every_layer_of_a_two_stage_detector_is_quantized(name: str, tiny_cfg: Callable[[str], Any]) -> None:
    """From the patch embedding to the deconvolution, with the roles of first and last layers."""
    report = _report(MODELS.build(tiny_cfg(name)))
    floats = [row.name for row in report.layers if not row.quantized]
    # Swin's position biases are added, not multiplied.
    assert all(name.endswith('relative_position_bias_table') for name in floats)
    assert {row.name for row in report.layers if row.role == 'first'} == {FIRST[name]}
    assert {row.name for row in report.layers if row.role == 'last'} == LAST[name]
    assert all(row.macs for row in report.layers if row.quantized)
    assert ('roi_head.mask_head.upsample' in {row.name for row in report.layers}) == name.startswith('mask')


@pytest.mark.parametrize('keep', ['nothing', 'all'])
def test_the_report_does_not_depend_on_the_proposals(keep: str, tiny_cfg: Callable[[str], Any]) -> None:
    """The report is the same without proposals, with as many as possible, and with other weights."""
    expected = _report(MODELS.build(tiny_cfg('mask-rcnn_r18'))).layers
    cfg = tiny_cfg('mask-rcnn_r18')
    cfg.test_cfg.rpn.min_bbox_size = 10**6 if keep == 'nothing' else -1
    torch.manual_seed(5)
    assert _report(MODELS.build(cfg)).layers == expected


def test_the_detector_is_restored(tiny_cfg: Callable[[str], Any]) -> None:
    detector = MODELS.build(tiny_cfg('faster-rcnn_r18'))
    dry_run(detector)
    assert 'forward' not in vars(detector.roi_head)


@pytest.mark.skipif(
    not isinstance(sys.modules.get('mmcv._ext'), TorchvisionOps), reason='a compiled mmcv has every operator'
)
@pytest.mark.parametrize('part', ['neck', 'roi_head.mask_head'])
def test_a_part_that_needs_a_compiled_mmcv_is_named_when_the_model_is_built(
    part: str, tiny_cfg: Callable[[str], Any]
) -> None:
    """CARAFE, which only full MMCV has, in the first stage and in the second."""
    carafe = dict(type='carafe', up_kernel=5, up_group=1, encoder_kernel=3, encoder_dilation=1, compressed_channels=4)
    cfg = tiny_cfg('mask-rcnn_r18')
    if part == 'neck':
        cfg.neck.update(type='FPN_CARAFE', start_level=0, end_level=-1, order=('conv', 'norm', 'act'))
        cfg.neck.update(norm_cfg=None, act_cfg=None, upsample_cfg=carafe)
    else:
        cfg.roi_head.mask_head.upsample_cfg = dict(carafe, scale_factor=2)
    with pytest.raises(
        UserError, match=rf"{part}\.\S+ \(CARAFEPack\) of MaskRCNN .*'carafe_forward'.*mim install mmcv"
    ):
        ZeroShotDetector(cfg, dict(w_bits=4, a_bits=4))


class ManyQueries(nn.Module):
    """Selects the highest scores of more locations than a small image has."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 8, stride=8)
        self.norm = nn.BatchNorm2d(4)
        self.queries = queries

    def forward(self, inputs: Tensor, data_samples: Any, mode: str) -> Tensor:
        return self.norm(self.embed(inputs)).flatten(1).topk(self.queries, dim=1).values


def test_the_image_is_large_enough_for_the_queries() -> None:
    assert dry_run_size(ManyQueries(queries=100)) == 64
    detector = ManyQueries(queries=900).train()
    assert dry_run_size(detector) == 128
    assert detector.training and detector.norm.training
    assert not detector.norm.running_mean.any()
    with pytest.raises(RuntimeError, match='out of range'):
        dry_run_size(ManyQueries(queries=10**6))
