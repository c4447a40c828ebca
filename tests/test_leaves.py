# SPDX-License-Identifier: Apache-2.0
"""The leaves in configs/zsq: a detector's published config and checkpoint with quantization added."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import mmdet
import pytest
import torch
import yaml
from mmdet.registry import DATASETS, METRICS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmzsq.config.compose import class_names, compose
from mmzsq.errors import UserError
from mmzsq.qat import ZeroShotDetector

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
LEAVES = CONFIGS / 'zsq'
MMDET = Path(mmdet.__file__).parent / '.mim'
OWN = {
    'yolov5-p_shapes': 'shapes/yolov5-p_shapes.py',
    **{f'yolov5-{size}': f'yolov5/yolov5-{size}_coco.py' for size in 'nsml'},
    **{f'yolo11-{size}': f'yolo11/yolo11-{size}_coco.py' for size in 'nsml'},
}
"""Configs of this package, under configs/."""
ORIGINS = {
    'mask-rcnn_swin-t': 'swin/mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    'mask-rcnn_swin-s': 'swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    'mask-rcnn_r50': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'faster-rcnn_r50': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'retinanet_r50': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'rtmdet-s': 'rtmdet/rtmdet_s_8xb32-300e_coco.py',
    'yolov3_d53': 'yolo/yolov3_d53_8xb8-ms-608-273e_coco.py',
    'yolox-s': 'yolox/yolox_s_8xb8-300e_coco.py',
}
"""Configs of MMDetection."""
BITS = {
    'yolov5-p_shapes': ('w4a4',),
    **{f'yolov5-{size}': ('w8a8', 'w6a6', 'w5a5', 'w4a8', 'w4a4') for size in 'nsml'},
    **{f'yolo11-{size}': ('w8a8', 'w6a6', 'w4a8') for size in 'nsml'},
    'mask-rcnn_swin-t': ('w8a8', 'w6a6', 'w4a8'),
    'mask-rcnn_swin-s': ('w8a8', 'w6a6', 'w4a8'),
    'mask-rcnn_r50': ('w8a8', 'w4a8'),
    'mask-rcnn_r50_voc': ('w8a8',),
    'faster-rcnn_r50': ('w4a8',),
    'retinanet_r50': ('w8a8', 'w4a8'),
    'rtmdet-s': ('w8a8', 'w4a8'),
    'yolov3_d53': ('w8a8', 'w4a8'),
    'yolox-s': ('w8a8', 'w4a8'),
}
ALL = [f'{detector}_{bits}' for detector, rows in BITS.items() for bits in rows]
STAGES = {
    **{name: [(320, 32), (640, 16)] for name in ORIGINS if 'rcnn' in name},
    'retinanet_r50': [(320, 32), (None, 16)],
    **{name: [(None, 64), (None, 32), (None, 32)] for name in ('rtmdet-s', 'yolox-s')},
    'yolov3_d53': [(None, 64), (None, 32), (608, 32)],
}
"""Sizes in pixels (None: chosen for the detector) and batches, from coarse to fine."""
SWIN_T = 'mask-rcnn_swin-t_w4a8'


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without network and without a cache."""

    def fail(url: str, *args: Any, **kwargs: Any) -> None:
        raise URLError('no network')

    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', fail)
    register_all_modules()


def _leaf(name: str) -> Config:
    return Config.fromfile(LEAVES / f'{name}.py')


def _origin(detector: str) -> Config:
    return Config.fromfile(MMDET / 'configs' / ORIGINS[detector])


def _without_scope(node: Any) -> Any:
    """MMEngine records in every dict of a base where the base was found."""
    if isinstance(node, dict):
        return {key: _without_scope(value) for key, value in node.items() if key != '_scope_'}
    return [_without_scope(value) for value in node] if isinstance(node, (list, tuple)) else node


def test_all_rows_have_a_leaf() -> None:
    assert {path.stem for path in LEAVES.glob('*.py')} == set(ALL)


@pytest.mark.parametrize('name', ALL)
def test_every_leaf_composes_and_matches_its_name(name: str, zero_weights: None) -> None:
    """All layers are quantized, the first and the last with 8 bits."""
    detector, bits = name.rsplit('_', 1)
    cfg = compose(_leaf(name))
    w_bits, a_bits = cfg.zsq.quantizer.w_bits, cfg.zsq.quantizer.a_bits
    assert f'w{w_bits}a{a_bits}' == bits
    assert (cfg.runner_type, cfg.zsq.preset) == ('mmzsq.ZeroShotRunner', 'default')
    if detector in OWN:
        assert cfg.model.detector == Config.fromfile(CONFIGS / OWN[detector]).model
    rows = MODELS.build(cfg.model).report.layers
    layers = [row for row in rows if row.quantized]
    # They are added to the attention scores, not multiplied.
    assert all(row.name.endswith('.relative_position_bias_table') for row in rows if not row.quantized)
    assert {(layer.w_bits, layer.a_bits) for layer in layers if not layer.role} == {(w_bits, a_bits)}
    assert {(layer.w_bits, layer.a_bits) for layer in layers if layer.role} == {(8, 8)}


@pytest.mark.parametrize('detector', ORIGINS)
def test_a_leaf_is_mmdets_config_with_our_bits(detector: str) -> None:
    """The model, the validation and the data are exactly MMDetection's."""
    origin = _origin(detector)
    for bits in BITS[detector]:
        cfg = compose(_leaf(f'{detector}_{bits}'))
        assert _without_scope(cfg.model.detector) == _without_scope(origin.model)
        for key in ('val_dataloader', 'val_evaluator', 'test_dataloader', 'test_evaluator', 'default_hooks'):
            assert _without_scope(cfg[key]) == _without_scope(_without_choice(origin)[key])
        assert class_names(cfg) is not None
        assert len(class_names(cfg)) == 80
        assert cfg.optim_wrapper.type == 'mmengine.OptimWrapper'
        assert (cfg.optim_wrapper.optimizer.type == 'AdamW') == ('swin' in detector)
        stages = [cfg.zsq.synthesis[name] for name in ('relabel', 'refine', 'synthesize')]
        assert [(stage.image_size, stage.batch_size) for stage in stages if stage is not None] == STAGES[detector]
        assert cfg.train_dataloader.batch_size == (16 if len(STAGES[detector]) == 3 else 8)
        assert cfg.zsq.calibration_set.num_images == (2000 if 'rcnn' in detector else 1000)
        assert len((LEAVES / f'{detector}_{bits}.py').read_text().splitlines()) < 15


def _without_choice(origin: Config) -> Config:
    """No checkpoint is chosen by its accuracy on real images."""
    origin.default_hooks.checkpoint.pop('save_best', None)
    return origin


@pytest.mark.parametrize('detector', ORIGINS)
def test_the_teacher_is_the_one_that_mmdet_publishes_for_this_config(detector: str) -> None:
    index = yaml.safe_load((MMDET / 'configs' / ORIGINS[detector]).with_name('metafile.yml').read_text())
    [published] = [model['Weights'] for model in index['Models'] if model['Config'] == f'configs/{ORIGINS[detector]}']
    assert {_leaf(f'{detector}_{bits}').load_from for bits in BITS[detector]} == {published}


@pytest.mark.parametrize('detector', [name for name in OWN if 'shapes' not in name])
def test_the_teacher_is_the_file_that_the_converter_writes(detector: str) -> None:
    files = {_leaf(f'{detector}_{bits}').load_from for bits in BITS[detector]}
    assert files == {f'checkpoints/{detector.replace("-", "")}.safetensors'}


@pytest.mark.parametrize('detector', ORIGINS)
def test_every_float_weight_keeps_its_name(detector: str, zero_weights: None) -> None:
    """So that a published checkpoint loads."""
    model = MODELS.build(compose(_leaf(f'{detector}_w4a8')).model)
    expected = dict(_shapes(MODELS.build(_origin(detector).model)))
    added = ('_quantizer.', '.log_input_scale')
    assert {name: shape for name, shape in _shapes(model) if not any(part in name for part in added)} == expected


def _shapes(model: torch.nn.Module) -> Iterator[tuple[str, torch.Size]]:
    for name, value in model.state_dict().items():
        yield name, value.shape


def test_the_voc_leaf_has_vocs_classes_data_and_metric(zero_weights: None) -> None:
    cfg = compose(_leaf('mask-rcnn_r50_voc_w8a8'))
    classes = DATASETS.get('VOCDataset').METAINFO['classes']
    assert class_names(cfg) == list(classes)
    assert cfg.val_dataloader.dataset.type == 'VOCDataset'
    assert METRICS.build(dict(cfg.val_evaluator, collect_device='cpu')).metric == 'mAP'
    assert (cfg.val_cfg.type, cfg.test_cfg.type) == ('ValLoop', 'TestLoop')
    heads = MODELS.build(cfg.model).student.roi_head
    assert heads.bbox_head.num_classes == heads.mask_head.num_classes == len(classes)


def test_a_checkpoint_of_stock_mmdet_starts_teacher_and_student(tmp_path: Path, zero_weights: None) -> None:
    """The detector of the named command, without downloading the backbone weights of its config."""
    origin = _origin('mask-rcnn_swin-t')
    assert origin.model.backbone.init_cfg.checkpoint.startswith('https://')
    stock = MODELS.build(origin.model)
    for parameter in stock.parameters():
        parameter.data.uniform_(-0.05, 0.05)
    path = tmp_path / 'stock.pth'
    meta = dict(dataset_meta=dict(CLASSES=('person',), PALETTE=[(220, 20, 60)]), epoch=36)
    torch.save(dict(meta=meta, state_dict=stock.state_dict(), message_hub={}), path)

    cfg = _leaf(SWIN_T)
    cfg.load_from = str(path)
    model: ZeroShotDetector = MODELS.build(compose(cfg).model)
    model.init_weights()
    assert model.teacher_meta['dataset_meta']['CLASSES'] == ('person',)
    teacher, student = model.teacher.state_dict(), model.state_dict()
    for name, value in stock.state_dict().items():
        assert torch.equal(teacher[name], value)
        assert torch.equal(student[name], value)


def test_without_network_and_teacher_one_message_states_the_fix(tmp_path: Path, zero_weights: None) -> None:
    """The message names the file and how to provide it."""
    cfg = _leaf(SWIN_T)
    model: ZeroShotDetector = MODELS.build(compose(cfg).model)
    with pytest.raises(UserError) as told:
        model.init_weights()
    assert cfg.load_from in str(told.value)
    assert '--cfg-options load_from=PATH' in str(told.value)
    assert str(tmp_path / 'cache') in str(told.value)
