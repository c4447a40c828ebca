# SPDX-License-Identifier: Apache-2.0
"""The leaves of detectors that MMDetection brings: its own model, its own checkpoint, our bits."""

from __future__ import annotations

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

from mmzsq.config import class_names, complete_section, compose
from mmzsq.detectors import ZeroShotDetector
from mmzsq.errors import UserError

LEAVES = Path(__file__).resolve().parents[1] / 'configs' / 'zsq'
MMDET = Path(mmdet.__file__).parent / '.mim'
ORIGINS = {
    'mask-rcnn_swin-t': 'swin/mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    'mask-rcnn_swin-s': 'swin/mask-rcnn_swin-s-p4-w7_fpn_amp-ms-crop-3x_coco.py',
    'mask-rcnn_r50': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'faster-rcnn_r50': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
}
BITS = {
    'mask-rcnn_swin-t': ('w8a8', 'w6a6', 'w4a8'),
    'mask-rcnn_swin-s': ('w8a8', 'w6a6', 'w4a8'),
    'mask-rcnn_r50': ('w8a8', 'w4a8'),
    'faster-rcnn_r50': ('w4a8',),
}
VOC = 'mask-rcnn_r50_voc_w8a8'
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
    """MMEngine notes in every dict of a base where the base was found."""
    if isinstance(node, dict):
        return {key: _without_scope(value) for key, value in node.items() if key != '_scope_'}
    return [_without_scope(value) for value in node] if isinstance(node, (list, tuple)) else node


def test_all_rows_have_a_leaf() -> None:
    expected = {f'{detector}_{bits}' for detector, rows in BITS.items() for bits in rows} | {VOC}
    found = {path.stem for path in LEAVES.glob('*.py') if 'rcnn' in path.name}
    assert found == expected


@pytest.mark.parametrize('detector', ORIGINS)
def test_a_leaf_is_mmdets_config_with_our_bits(detector: str) -> None:
    """The model, the validation and the data are mmdet's to the letter."""
    origin = _origin(detector)
    for bits in BITS[detector]:
        cfg = compose(_leaf(f'{detector}_{bits}'))
        assert f'w{cfg.zsq.quantizer.w_bits}a{cfg.zsq.quantizer.a_bits}' == bits
        assert _without_scope(cfg.model.detector) == _without_scope(origin.model)
        for key in ('val_dataloader', 'val_evaluator', 'test_dataloader', 'test_evaluator', 'default_hooks'):
            assert _without_scope(cfg[key]) == _without_scope(origin[key])
        assert class_names(cfg) is not None
        assert len(class_names(cfg)) == 80
        assert cfg.optim_wrapper.type == 'OptimWrapper'
        assert cfg.train_dataloader.batch_size == 8
        assert (cfg.optim_wrapper.optimizer.type == 'AdamW') == ('swin' in detector)
        stages = cfg.zsq.synthesis
        assert [(s.image_size, s.batch_size) for s in (stages.relabel, stages.synthesise)] == [(320, 32), (640, 16)]
        assert len((LEAVES / f'{detector}_{bits}.py').read_text().splitlines()) < 15


@pytest.mark.parametrize('preset', ['paper', 'paper_transformer'])
def test_with_the_papers_preset_a_leaf_is_the_paper_to_the_letter(preset: str) -> None:
    """Weights of its losses are for its sizes and batches."""
    cfg = _leaf(SWIN_T)
    cfg.zsq.preset = preset
    own, expected = compose(cfg).zsq.to_dict(), complete_section(dict(preset=preset))
    for key in ('synthesis', 'label_sampler', 'distillation', 'train'):
        assert own[key] == expected[key]


@pytest.mark.parametrize('detector', ORIGINS)
def test_the_teacher_is_the_one_that_mmdet_publishes_for_this_config(detector: str) -> None:
    index = yaml.safe_load((MMDET / 'configs' / ORIGINS[detector]).with_name('metafile.yml').read_text())
    [published] = [model['Weights'] for model in index['Models'] if model['Config'] == f'configs/{ORIGINS[detector]}']
    assert {_leaf(f'{detector}_{bits}').load_from for bits in BITS[detector]} == {published}


@pytest.mark.parametrize('detector', ORIGINS)
def test_every_float_weight_keeps_its_name_and_all_layers_are_quantized(detector: str, zero_weights: None) -> None:
    """So that a published checkpoint loads."""
    model = MODELS.build(compose(_leaf(f'{detector}_w4a8')).model)
    expected = {name: value.shape for name, value in MODELS.build(_origin(detector).model).state_dict().items()}
    own = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: shape for name, shape in own.items() if '_quantizer.' not in name} == expected
    assert [row.name for row in model.report.layers if not row.quantized] == []


def test_the_papers_transformer_is_quantized_in_all_of_its_backbone_alone(zero_weights: None) -> None:
    """From the patch embedding on, one step a tensor."""
    cfg = _leaf(SWIN_T)
    cfg.zsq.preset = 'paper_transformer'
    rows = MODELS.build(compose(cfg).model).report.to_dict()['layers']
    assert {row['name'] for row in rows if 'weight' in row} == {
        row['name'] for row in rows if row['name'].startswith('backbone.')
    }
    assert not any(row['weight']['per_channel'] for row in rows if 'weight' in row)


def test_the_voc_leaf_has_vocs_classes_data_and_metric(zero_weights: None) -> None:
    cfg = compose(_leaf(VOC))
    classes = DATASETS.get('VOCDataset').METAINFO['classes']
    assert class_names(cfg) == list(classes)
    assert cfg.val_dataloader.dataset.type == 'VOCDataset'
    assert METRICS.build(dict(cfg.val_evaluator, collect_device='cpu')).metric == 'mAP'
    assert (cfg.val_cfg.type, cfg.test_cfg.type) == ('ValLoop', 'TestLoop')
    model = MODELS.build(cfg.model)
    heads = model.student.roi_head
    assert heads.bbox_head.num_classes == heads.mask_head.num_classes == len(classes)
    assert [row.name for row in model.report.layers if not row.quantized] == []


def test_a_checkpoint_of_stock_mmdet_starts_teacher_and_student(tmp_path: Path, zero_weights: None) -> None:
    """The named command's detector; backbone weights that its config names are not fetched."""
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


def test_without_network_and_teacher_one_message_says_what_to_do(tmp_path: Path, zero_weights: None) -> None:
    """Which file, and how to give it."""
    cfg = _leaf(SWIN_T)
    model: ZeroShotDetector = MODELS.build(compose(cfg).model)
    with pytest.raises(UserError) as told:
        model.init_weights()
    assert cfg.load_from in str(told.value)
    assert '--cfg-options load_from=PATH' in str(told.value)
    assert str(tmp_path / 'cache') in str(told.value)
