# SPDX-License-Identifier: Apache-2.0
"""The leaves of blood cells: one recipe per detector at every bit width, and its comparisons."""

from __future__ import annotations

from pathlib import Path

import pytest
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmzsq.config.compose import class_names, compose

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'bccd'
DETECTORS = ('mask-rcnn_r50_bccd', 'mask-rcnn_swin-t_bccd')
BITS = ('w8a8', 'w6a6', 'w4a8')
KINDS = ('_lsq-real', '_lsq-real-distil')


def leaf(name: str) -> Config:
    folder = CONFIGS / 'comparison' if name.endswith(KINDS) else CONFIGS
    return Config.fromfile(folder / f'{name}.py')


def test_all_rows_and_columns_have_a_leaf() -> None:
    rows = {f'{detector}_{bits}' for detector in DETECTORS for bits in BITS}
    # YOLOX-nano is not in the comparison.
    assert {path.stem for path in CONFIGS.glob('*_w?a?.py') if not path.stem.startswith('yolox')} == rows
    assert {path.stem for path in (CONFIGS / 'comparison').glob('*.py')} == {
        f'{r}{kind}' for r in rows for kind in KINDS
    }
    assert all(len(path.read_text().splitlines()) < 10 for path in CONFIGS.rglob('*_w?a?*.py'))


@pytest.mark.parametrize('detector', DETECTORS)
def test_a_leaf_is_the_teachers_config_with_our_bits(detector: str) -> None:
    teacher = Config.fromfile(CONFIGS / f'{detector}.py')
    epochs = teacher.train_cfg.max_epochs
    sets = []
    for bits in BITS:
        cfg = compose(leaf(f'{detector}_{bits}'))
        assert f'w{cfg.zsq.quantizer.w_bits}a{cfg.zsq.quantizer.a_bits}' == bits
        assert cfg.model.detector == teacher.model
        # The path of the teacher's last checkpoint by tools/train.py.
        assert cfg.load_from == f'work_dirs/{detector}/epoch_{epochs}.pth'
        assert teacher.default_hooks.checkpoint.interval == epochs
        for key in ('val_dataloader', 'val_evaluator', 'test_dataloader', 'test_evaluator'):
            assert cfg[key] == teacher[key]
        assert class_names(cfg) == ['RBC', 'WBC', 'Platelets']
        steps = cfg.train_cfg.max_epochs * cfg.zsq.calibration_set.num_images / cfg.train_dataloader.batch_size
        assert 200 <= steps <= 300
        # Images of the shape that the detector was trained on: height, width.
        assert tuple(cfg.zsq.synthesis.synthesize.image_size) == tuple(teacher.image_size[::-1])
        sets.append((cfg.zsq.synthesis, cfg.zsq.label_sampler, cfg.zsq.calibration_set))
    # All bit widths can share one.
    assert sets[0] == sets[1] == sets[2]


@pytest.mark.parametrize('detector', DETECTORS)
def test_a_comparison_differs_in_the_setting_of_its_name_only(detector: str) -> None:
    teacher = Config.fromfile(CONFIGS / f'{detector}.py')
    for bits in BITS:
        ours = compose(leaf(f'{detector}_{bits}'))
        for kind in KINDS:
            cfg = compose(leaf(f'{detector}_{bits}{kind}'))
            assert cfg.train_dataloader.dataset.type == 'mmzsq.SeededDataset'
            dataset = cfg.train_dataloader.dataset.dataset
            # The images and labels that the teacher learned from, without augmentation.
            assert {**dataset, 'pipeline': None} == {**teacher.train_dataloader.dataset, 'pipeline': None}
            kinds = ['LoadImageFromFile', 'mmdet.LoadAnnotations', 'Resize', 'PackDetInputs']
            assert [step.type for step in dataset.pipeline] == kinds
            assert dataset.pipeline[1].with_mask == (kind == '_lsq-real')
            assert dataset.pipeline[1].poly2mask == teacher.train_dataloader.dataset.pipeline[1].poly2mask is False
            assert cfg.zsq.quantizer == ours.zsq.quantizer
            assert cfg.optim_wrapper == ours.optim_wrapper
            assert cfg.load_from == ours.load_from
            steps = cfg.train_cfg.max_epochs * 292 / cfg.train_dataloader.batch_size
            assert steps == pytest.approx(ours.train_cfg.max_epochs * ours.zsq.calibration_set.num_images / 8, rel=0.02)
            distillation = cfg.zsq.distillation
            if kind == '_lsq-real':
                assert (distillation.detection_weight, list(distillation.losses)) == (1.0, [])
            else:
                assert distillation == ours.zsq.distillation


def test_one_setting_seeds_set_and_run() -> None:
    for kind in ('', *KINDS):
        cfg = leaf(f'{DETECTORS[0]}_w4a8{kind}')
        cfg.merge_from_dict({'zsq.calibration_set.seed': 5})
        assert compose(cfg).randomness.seed == 5


@pytest.mark.parametrize('detector', DETECTORS)
def test_all_layers_are_quantized(detector: str, zero_weights: None) -> None:
    register_all_modules()
    model = MODELS.build(compose(leaf(f'{detector}_w4a8')).model)
    left = [row.name for row in model.report.layers if not row.quantized]
    # Added to scores, not multiplied.
    assert all(name.endswith('relative_position_bias_table') for name in left)
    assert len(left) == (12 if 'swin' in detector else 0)
