# SPDX-License-Identifier: Apache-2.0
"""Pure-Python configs: bases, classes as types, files that can be read again, and advice for mixed styles."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mmcv.transforms
import mmdet
import pytest
from mmcv.ops import RoIAlign, nms
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.registry import TRANSFORMS as MMDET_TRANSFORMS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.config.lazy import LazyObject
from mmengine.model.weight_init import PretrainedInit
from mmengine.registry import WEIGHT_INITIALIZERS
from pure_python_project import DETECTORS, LEAF, SHRUNK, make_project
from torch import nn

import mmzsq.configs
from mmzsq import base, cli
from mmzsq.config import compose
from mmzsq.config.compose import detector_section
from mmzsq.config.plain_types import stable_text, type_name, with_plain_types
from mmzsq.errors import UserError
from mmzsq.tasks.two_stage.support import unsupported_reason

Project = Callable[[str], Path]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """Make a user's folder, also the cwd, and return the path of its leaf."""
    register_all_modules()
    monkeypatch.chdir(tmp_path)
    return partial(make_project, tmp_path)


def call(monkeypatch: pytest.MonkeyPatch, tool: Any, *arguments: str) -> None:
    monkeypatch.setattr(sys, 'argv', ['tool', *arguments])
    cli.run(tool.main)


def load(path: Path) -> Config:
    options = argparse.Namespace(config=str(path), local_rank=0, launcher='none', cfg_options=None, work_dir=None)
    return cli.load_config(options)


def values(section: Any, *keys: str) -> Iterator[Any]:
    if isinstance(section, dict):
        for key, value in section.items():
            if key in keys:
                yield value
            yield from values(value, *keys)
    elif isinstance(section, (list, tuple)):
        for value in section:
            yield from values(value, *keys)


def without_scope(section: Any) -> Any:
    if isinstance(section, dict):
        return {
            key: value.rpartition('.')[2] if key == 'type' else without_scope(value)
            for key, value in section.items()
            if key != '_scope_'
        }
    if isinstance(section, (list, tuple)):
        return [without_scope(value) for value in section]
    return section


# Bases.


def test_each_text_base_has_a_pure_python_one(repo: Path) -> None:
    ours = {path.name: path for path in Path(mmzsq.configs.__file__).parent.glob('zsq_*.py')}
    text = {path.name: path for path in (repo / 'configs/_base_').glob('zsq_*.py')}
    assert set(ours) == set(text) and len(ours) >= 5
    for name in ours:
        assert Config.fromfile(ours[name]).to_dict() == Config.fromfile(text[name]).to_dict()


@pytest.mark.parametrize('bits', ['w4a8', 'w8a8'])
def test_the_path_of_a_base_can_be_printed(
    bits: str, repo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, base, bits)
    printed = Path(capsys.readouterr().out.strip())
    assert printed.is_absolute()
    assert printed.read_bytes() == (repo / f'configs/_base_/zsq_{bits}.py').read_bytes()
    call(monkeypatch, base)
    assert bits in capsys.readouterr().out.split()


def test_an_unknown_base_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, base, 'w3a8')
    assert ended.value.code == 2
    assert re.search("no base 'w3a8': choose one of .*w4a8.* Did you mean", capsys.readouterr().err)


def test_a_text_config_can_evaluate_the_path_of_a_base(tmp_path: Path) -> None:
    """MMEngine evaluates ``_base_``. Such a leaf works with tools that do not import mmzsq, on any machine."""
    (tmp_path / 'leaf.py').write_text("_base_ = [__import__('mmzsq.base').base.path('w5a5')]")
    assert Config.fromfile(tmp_path / 'leaf.py').zsq.quantizer.w_bits == 5


def test_the_leaf_of_the_guide_composes(repo: Path, tmp_path: Path) -> None:
    [leaf] = re.findall(
        r'```python\n(# my_python_detector_.*?)```', (repo / 'docs/your_detector.md').read_text(), re.DOTALL
    )
    shutil.copytree(DETECTORS, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'rtmdet.py').rename(tmp_path / 'my_python_detector.py')
    (tmp_path / 'leaf.py').write_text(leaf)
    cfg = compose(load(tmp_path / 'leaf.py'))
    assert (cfg.model.detector.type, cfg.train_dataloader.batch_size) == ('mmdet.RTMDet', 8)
    assert (cfg.model.quantizer.w_bits, cfg.model.quantizer.a_bits) == (4, 8)
    assert cfg.zsq.synthesis.refine is None


# Types.


class Local:
    """A class that no registry has."""


@pytest.mark.parametrize(
    ('kind', 'name'),
    [
        # A function shadows this module.
        (LazyObject('mmdet.models.losses.iou_loss', 'GIoULoss'), 'mmdet.GIoULoss'),
        (LazyObject('torch').nn.SiLU, 'SiLU'),
        (nn.BatchNorm2d, 'BN'),
        (PretrainedInit, 'Pretrained'),
        (LazyObject('mmcv.ops', 'nms'), 'nms'),
        (RoIAlign, 'RoIAlign'),
        # MMDetection registers another class by this name.
        (mmcv.transforms.Resize, 'mmengine.Resize'),
        (LazyObject('mmzsq.quantization.config', 'QuantizationConfig'), 'mmzsq.quantization.config.QuantizationConfig'),
        ('mmdet.RTMDet', 'mmdet.RTMDet'),
        (None, None),
    ],
)
def test_types_become_names(kind: Any, name: Any) -> None:
    assert type_name(kind) == name


def test_names_mean_the_same_object() -> None:
    for cls, registry in (
        (mmcv.transforms.Resize, MMDET_TRANSFORMS),
        (mmdet.datasets.transforms.Resize, MMDET_TRANSFORMS),
        (mmdet.models.losses.GIoULoss, MMDET_MODELS),
        (nn.SiLU, MMDET_MODELS),
        (argparse.Namespace, MMDET_MODELS),
        (PretrainedInit, WEIGHT_INITIALIZERS),
    ):
        assert registry.get(type_name(cls)) is cls


def test_a_class_without_a_name_is_kept_and_described_without_an_address() -> None:
    class Inner(Local):
        pass

    other = dict(activation=nn.ReLU, of_type=dict(type=nms))
    cfg = with_plain_types(Config(dict(model=dict(type=Inner, other=other))))
    assert cfg.model.type is Inner
    # Only types are looked up by name.
    assert cfg.model.other.activation is nn.ReLU
    assert cfg.model.other.of_type.type == 'nms'
    text = json.dumps(dict(type=Inner, function=nms, lazy=LazyObject('torch.nn', 'ReLU')), default=stable_text)
    assert 'Inner' in text and 'torch.nn.ReLU' in text and '0x' not in text


def test_an_import_that_fails_names_its_key() -> None:
    cfg = Config(dict(model=dict(heads=[dict(type=LazyObject('mmdet.models', 'NoSuchHead'))])))
    with pytest.raises(UserError, match=r'model\.heads\[0\]\.type .*cannot be imported.*NoSuchHead'):
        with_plain_types(cfg)


# Detectors.


def test_a_composed_faster_rcnn_is_that_of_the_text_config(project: Project) -> None:
    leaf = project('faster_rcnn')
    leaf.write_text(LEAF.format(name='faster_rcnn').replace('.tiny_', '.'))
    text = Config.fromfile(Path(mmdet.__file__).parent / '.mim/configs/faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
    cfg = compose(Config.fromfile(leaf))
    assert without_scope(cfg.model.detector) == without_scope(text.model)
    assert without_scope(cfg.test_dataloader) == without_scope(text.test_dataloader)
    assert cfg.default_scope is None
    assert without_scope(detector_section(Config.fromfile(leaf))) == without_scope(text.model)


@pytest.mark.parametrize('name', SHRUNK)
def test_a_composed_config_survives_a_file(name: str, project: Project, tmp_path: Path) -> None:
    leaf = project(name)
    cfg = compose(Config.fromfile(leaf))
    assert all(isinstance(kind, str) for kind in values(cfg.to_dict(), 'type', 'ema_type'))
    # EMAHook and PipelineSwitchHook train a float detector.
    assert all(hook.type.startswith('mmzsq.') for hook in cfg.custom_hooks)
    cfg.dump(tmp_path / 'dumped.py')
    read = Config.fromfile(tmp_path / 'dumped.py')
    assert compose(read).to_dict() == cfg.to_dict()
    detector = MMDET_MODELS.build(read.model.detector)
    stock = MMDET_MODELS.build(Config.fromfile(leaf).model)
    assert str(detector) == str(stock)
    # Options of the command line find their keys.
    cfg = load(leaf)
    assert cfg.zsq.quantizer.a_bits == 8 and cfg.model.bbox_head.num_classes == 2 if name == 'rtmdet' else True


def test_nms_as_a_function_is_known_to_the_batched_loss(project: Project) -> None:
    cfg = Config.fromfile(project('faster_rcnn'))
    assert cfg.model.train_cfg.rpn_proposal.nms.type is nms
    assert unsupported_reason(MMDET_MODELS.build(cfg.model)) is None
    assert unsupported_reason(MMDET_MODELS.build(compose(cfg).model.detector)) is None


# Mixed styles.


def test_a_text_leaf_over_a_pure_python_detector_is_told_what_to_write(tmp_path: Path) -> None:
    shutil.copytree(DETECTORS, tmp_path / 'detectors')
    (tmp_path / 'leaves').mkdir()
    leaf = tmp_path / 'leaves' / 'leaf.py'
    leaf.write_text("_base_ = ['../detectors/rtmdet.py', 'mmzsq::_base_/zsq_w6a6.py']\n")
    with pytest.raises(UserError, match=r'its base \.\./detectors/rtmdet\.py is a pure-Python config') as refused:
        load(leaf)
    # What it says works.
    leaf.write_text(str(refused.value).partition(':\n')[2])
    cfg = load(leaf)
    assert (cfg.zsq.quantizer.w_bits, cfg.model.type) == (6, 'mmdet.RTMDet')


def test_names_that_python_cannot_import_are_told(tmp_path: Path) -> None:
    shutil.copytree(DETECTORS, tmp_path, dirs_exist_ok=True)
    (tmp_path / 'rtmdet.py').rename(tmp_path / 'rtmdet-s.py')
    leaf = tmp_path / 'leaf.py'
    leaf.write_text(f"_base_ = ['rtmdet-s.py', {base.path('w4a8')!r}]\n")
    with pytest.raises(UserError) as refused:
        load(leaf)
    assert 'from mmzsq.configs.zsq_w4a8 import *' in str(refused.value)
    assert 'Rename rtmdet-s.py' in str(refused.value)


def test_a_pure_python_leaf_over_a_text_detector_is_told_what_to_write(tmp_path: Path) -> None:
    (tmp_path / 'detector.py').write_text("_base_ = 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'\n")
    leaf = tmp_path / 'leaf.py'
    bases = 'from .detector import *\n    from mmzsq.configs.zsq_w4a8 import *'
    leaf.write_text(f'from mmengine.config import read_base\n\nwith read_base():\n    {bases}\n')
    with pytest.raises(UserError, match=r'its base \.detector is a text config') as refused:
        load(leaf)
    leaf.write_text(str(refused.value).partition(':\n')[2])
    assert load(leaf).zsq.quantizer.w_bits == 4


@pytest.mark.parametrize('line', ['zsq = dict(train=dict(max_epochs=2))', 'zsq: dict = dict()'])
def test_a_section_that_would_be_lost_is_refused(tmp_path: Path, line: str) -> None:
    shutil.copytree(DETECTORS, tmp_path, dirs_exist_ok=True)
    leaf = tmp_path / 'leaf.py'
    bases = 'with read_base():\n    from .rtmdet import *\n    from mmzsq.configs.zsq_w4a8 import *\n'
    leaf.write_text(f'from mmengine.config import read_base\n{bases}{line}\n')
    with pytest.raises(UserError, match=r'leaf\.py, line 5: .*zsq\.merge'):
        load(leaf)
    leaf.write_text(f'from mmengine.config import read_base\n{bases}zsq.merge(dict(train=dict(max_epochs=2)))\n')
    assert load(leaf).zsq == dict(quantizer=dict(type='mmzsq.LSQ', w_bits=4, a_bits=8), train=dict(max_epochs=2))


def test_a_wrong_module_of_this_package_is_told_the_right_ones(tmp_path: Path) -> None:
    leaf = tmp_path / 'leaf.py'
    leaf.write_text(
        'from mmengine.config import read_base\nwith read_base():\n    from mmzsq.configs._base_.zsq_w4a8 import *\n'
    )
    with pytest.raises(UserError, match=r'bases of mmzsq for pure-Python configs are .*mmzsq\.configs\.zsq_w4a8'):
        load(leaf)
