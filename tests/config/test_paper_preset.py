# SPDX-License-Identifier: Apache-2.0
"""``zsq.preset=paper`` gives the leaf of each detector the values of the paper, which are written out here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmzsq.config import compose
from mmzsq.synthesis import TotalVariationPrior

LEAVES = Path(__file__).resolve().parents[2] / 'configs' / 'zsq'

QUANTIZER = dict(
    type='mmzsq.LSQ',
    weight=dict(scheme='signed', per_channel=False, init='lsq', narrow=False),
    activation=dict(scheme='signed', init='lsq'),
    step='linear',
)
ADAPTIVE = dict(
    type='mmzsq.AdaptiveLabelSampler',
    start=dict(type='mmzsq.SingleBoxSampler', side=(0.2, 0.8)),
    warmup=800,
    score_thr=0.2,
    add_iou=0.35,
    remove_iou=0.35,
    area=(0.01, 0.85),
)
YOLO_TRAINING = dict(
    max_epochs=100,
    # Quantizer steps share the optimizer and its rate.
    step_lr=None,
    bn='train',
    ema=0.9999,
    clip_grad=10.0,
    amp=True,
    # Steps are initialized on the first batch.
    init_batches=1,
)
YOLOV5 = dict(
    quantizer=dict(QUANTIZER, first_bits=None, last_bits=None),
    label_sampler=dict(ADAPTIVE, interval=50),
    calibration_set=dict(num_images=2000),
    synthesis=dict(
        relabel=dict(image_size=160, iterations=2500, batch_size=64),
        refine=None,
        synthesize=dict(image_size=640, iterations=2500, batch_size=32),
        priors=[
            dict(type='mmzsq.BNStatisticsPrior', form='l2', weight=0.01, first_weight=2.0),
            # For transformers; it does not apply without attention.
            dict(type='mmzsq.PatchSimilarityPrior', weight=1.0),
            dict(type='mmzsq.TotalVariationPrior', weight=0.0005),
        ],
        detection_weight=0.5,
        detection_reduction='sum',
        lr=0.2,
        warmup=0,
        betas=(0.9, 0.999),
        init='uniform',
        cutout=dict(probability=0.5, area=(0.02, 0.2), ratio=(0.3, 3.3), value=0.0),
        clamp=True,
        keep='best',
        keep_interval=50,
    ),
    distillation=dict(
        detection_weight=0.04,
        losses=[
            dict(type='mmzsq.PredictionKLLoss', tau=4.0, loss_weight=0.1),
            dict(type='mmzsq.FeatureMSELoss', modules=['type:Conv2d', 'type:_BatchNorm'], loss_weight=1.0),
        ],
    ),
    train=dict(
        YOLO_TRAINING,
        batch_size=32,
        accumulate=1,
        # To 1e-6.
        optimizer=dict(type='Adam', lr=1e-4, weight_decay=5e-4),
        schedule='linear',
        final_lr_ratio=0.01,
    ),
)
YOLO11 = dict(
    quantizer=dict(QUANTIZER, first_bits=None, scope=['backbone', 'neck']),
    label_sampler=dict(ADAPTIVE, interval=100),
    calibration_set=dict(num_images=2000),
    synthesis=dict(
        relabel=dict(image_size=160, iterations=3000, batch_size=512),
        refine=None,
        synthesize=dict(image_size=640, iterations=3000, batch_size=32),
        priors=[
            dict(type='mmzsq.BNStatisticsPrior', form='l2', weight=0.05, first_weight=5.0),
            dict(type='mmzsq.TotalVariationPrior', weight=0.002),
        ],
        detection_weight=0.5,
        detection_reduction='sum',
        lr=0.2,
        warmup=0,
        betas=(0.9, 0.999),
        init='uniform',
        cutout=None,
        clamp=False,
        keep='best',
        keep_interval=100,
    ),
    distillation=dict(
        detection_weight=0.01,
        losses=[
            dict(type='mmzsq.PredictionKLLoss', tau=4.0, loss_weight=0.1),
            dict(type='mmzsq.FeatureMSELoss', modules=['type:Conv2d', 'type:_BatchNorm'], loss_weight=1.0),
        ],
    ),
    train=dict(
        YOLO_TRAINING,
        batch_size=16,
        accumulate=4,
        optimizer=dict(type='Adam', lr=1e-5, weight_decay=5e-4),
        schedule='constant',
    ),
)
IMAGENET_STD = (58.395, 57.12, 57.375)
UNIT = sum(IMAGENET_STD) / 3 / 255
"""Of normalized inputs, in which the paper optimizes, in units of images in [0, 1]."""
MASK_RCNN_SWIN = dict(
    quantizer=dict(QUANTIZER, scope='backbone', first_bits='same'),
    synthesis=dict(
        relabel=None,
        refine=None,
        synthesize=dict(image_size=640, iterations=2000, batch_size=12),
        priors=[
            dict(type='mmzsq.PatchSimilarityPrior', weight=1.0),
            dict(type='mmzsq.TotalVariationPrior', weight=0.001 / UNIT),
        ],
        detection_weight=10.0,
        detection_reduction='mean',
        lr=0.2 * UNIT,
        warmup=100,
        betas=(0.5, 0.9),
        init='normal',
        cutout=None,
        clamp=False,
    ),
    distillation=dict(
        detection_weight=1.0,
        losses=[
            dict(type='mmzsq.PredictionKLLoss', tau=1.0, loss_weight=1.0, join_maps=True, heads=['rpn_head']),
            dict(type='mmzsq.FeatureMSELoss', modules=['type:SwinBlock'], loss_weight=1.0),
        ],
    ),
    train=dict(
        max_epochs=15,
        batch_size=8,
        accumulate=1,
        optimizer=dict(type='AdamW', lr=1e-6, weight_decay=0.05),
        step_lr=None,
        schedule='constant',
        amp=True,
    ),
)
# The paper states its quantized layers, and the images of its set for VOC. All else is that of the preset.
MASK_RCNN_R50 = dict(
    YOLOV5,
    quantizer=dict(QUANTIZER, scope=['backbone', 'neck'], skip=['backbone.conv1', 'backbone.layer4.2']),
)
PAPER = {
    **{f'yolov5-{size}': (YOLOV5, ('w8a8', 'w6a6', 'w5a5', 'w4a4', 'w4a8')) for size in 'sml'},
    **{f'yolo11-{size}': (YOLO11, ('w8a8', 'w6a6', 'w4a8')) for size in 'sml'},
    'mask-rcnn_r50': (MASK_RCNN_R50, ('w8a8', 'w4a8')),
    'mask-rcnn_r50_voc': (dict(MASK_RCNN_R50, calibration_set=dict(num_images=50)), ('w8a8',)),
    **{f'mask-rcnn_swin-{size}': (MASK_RCNN_SWIN, ('w8a8', 'w6a6', 'w4a8')) for size in 'ts'},
}
"""By detector of a table: its settings, and the bits of its rows."""


@pytest.fixture(autouse=True)
def registered() -> None:
    register_all_modules()


def _paper(leaf: str) -> Config:
    cfg = Config.fromfile(LEAVES / f'{leaf}.py')
    cfg.merge_from_dict({'zsq.preset': 'paper'})
    return compose(cfg)


def _only(section: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of ``section`` that ``like`` has, at every depth."""
    return {key: _only(section[key], value) if isinstance(value, dict) else section[key] for key, value in like.items()}


@pytest.mark.parametrize('detector', PAPER)
def test_every_row_of_the_paper_has_its_values(detector: str) -> None:
    expected, rows = PAPER[detector]
    for bits in rows:
        section = _paper(f'{detector}_{bits}').zsq.to_dict()
        assert _only(section, expected) == expected
        assert f'w{section["quantizer"]["w_bits"]}a{section["quantizer"]["a_bits"]}' == bits
        assert section['preset'] == 'paper'


def test_swin_is_optimized_in_units_of_its_normalized_inputs() -> None:
    """Compares an optimizer step, and the variation of one image, in both units."""
    cfg = _paper('mask-rcnn_swin-t_w4a8')
    assert tuple(cfg.model.detector.data_preprocessor.std) == IMAGENET_STD
    synthesis = cfg.zsq.synthesis
    inputs = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = inputs * torch.tensor(IMAGENET_STD).view(3, 1, 1) / 255
    steps = synthesis.lr * 255 / torch.tensor(IMAGENET_STD)
    assert steps.tolist() == pytest.approx([0.2] * 3, rel=0.02)
    prior = TotalVariationPrior(synthesis.priors[1].weight)
    assert prior(images).item() == pytest.approx(TotalVariationPrior(0.001)(inputs).item(), rel=0.01)


def _float_layers(leaf: str) -> tuple[set[str], set[str]]:
    """Names of the layers that the paper's preset leaves in full precision, and of all layers."""
    rows = MODELS.build(_paper(leaf).model).report.layers
    assert {(row.w_bits, row.a_bits) for row in rows if row.quantized} == {(4, 8)}
    layers = [row for row in rows if not row.name.endswith('.relative_position_bias_table')]
    return {row.name for row in layers if not row.quantized}, {row.name for row in layers}


def test_yolov5_keeps_its_first_and_last_convolutions_in_float(zero_weights: None) -> None:
    kept, names = _float_layers('yolov5-s_w4a8')
    assert kept == {'backbone.stem.conv', *(name for name in names if name.startswith('bbox_head.'))}
    assert len(kept) == 4


def test_yolo11_keeps_its_first_convolution_and_its_head_in_float(zero_weights: None) -> None:
    kept, names = _float_layers('yolo11-s_w4a8')
    [first] = [name for name in kept if not name.startswith('bbox_head.')]
    assert first == next(iter(sorted(name for name in names if name.startswith('backbone.stem'))))
    assert kept - {first} == {name for name in names if name.startswith('bbox_head.')}


def test_mask_rcnn_r50_keeps_stem_last_bottleneck_and_heads_in_float(zero_weights: None) -> None:
    kept, names = _float_layers('mask-rcnn_r50_w4a8')
    last = {f'backbone.layer4.2.conv{index}' for index in (1, 2, 3)}
    heads = {name for name in names if name.startswith(('rpn_head.', 'roi_head.'))}
    assert kept == {'backbone.conv1', *last, *heads}


def test_mask_rcnn_swin_is_quantized_in_the_whole_backbone_only(zero_weights: None) -> None:
    """The patch embedding is included."""
    kept, names = _float_layers('mask-rcnn_swin-t_w4a8')
    assert names - kept == {name for name in names if name.startswith('backbone.')}


def test_values_reach_the_runner() -> None:
    cfg = _paper('yolo11-m_w6a6')
    assert (cfg.train_dataloader.batch_size, cfg.optim_wrapper.accumulative_counts) == (16, 4)
    assert cfg.optim_wrapper.optimizer == dict(type='Adam', lr=1e-5, weight_decay=5e-4)
    assert cfg.optim_wrapper.clip_grad.max_norm == 10
    assert cfg.param_scheduler == []
    assert cfg.custom_hooks[-1].momentum == pytest.approx(1e-4)
    [linear] = _paper('yolov5-m_w6a6').param_scheduler
    assert (linear.type, linear.start_factor, linear.end_factor, linear.end) == ('mmengine.LinearLR', 1.0, 0.01, 100)
