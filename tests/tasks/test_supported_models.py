# SPDX-License-Identifier: Apache-2.0
"""Models that are no detectors of fixed categories in single images are refused by name, with the reason."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES
from harness import CONFIGS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from mmzsq.config.compose import compose
from mmzsq.errors import UserError
from mmzsq.tasks.supported_models import check_supported

UNSUPPORTED = (
    'bytetrack/bytetrack_yolox_x_8xb4-80e_crowdhuman-mot17halftrain_test-mot17halfval.py',
    'masktrack_rcnn/masktrack-rcnn_mask-rcnn_r50_fpn_8xb1-12e_youtubevis2019.py',
    'reid/reid_r50_8xb32-6e_mot17train80_test-mot17val20.py',
    'glip/glip_atss_swin-t_a_fpn_dyhead_pretrain_obj365.py',
    'grounding_dino/grounding_dino_swin-t_finetune_16xb2_1x_coco.py',
    'panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py',
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py',
    'maskformer/maskformer_r50_ms-16xb1-75e_coco.py',
    'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
    'lad/lad_r50-paa-r101_fpn_2xb8_coco_1x.py',
    'ld/ld_r18-gflv1-r101_fpn_1x_coco.py',
    'fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py',
    'rpn/rpn_r50_fpn_1x_coco.py',
)


@pytest.mark.parametrize('config', UNSUPPORTED)
def test_the_page_quotes_the_message_of_every_unsupported_kind(config: str, repo: Path) -> None:
    register_all_modules()
    cfg = Config.fromfile(CONFIGS / config)
    cfg.merge_from_dict(dict(zsq=dict(), work_dir='work'))
    with pytest.raises(UserError, match=r'is not supported: |"stuff" categories') as caught:
        compose(cfg)
    page = re.sub(r'\s+', ' ', (repo / 'docs/zoo.md').read_text())
    assert str(caught.value) in page


def retinanet(**changes: Any) -> Config:
    register_all_modules()
    cfg = Config.fromfile(CONFIGS / 'retinanet/retinanet_r50_fpn_1x_coco.py')
    cfg.merge_from_dict(changes)
    return cfg


@pytest.mark.parametrize(
    ('changes', 'part'),
    [
        ({'model.backbone.in_channels': 1}, '1 channel (model.backbone.in_channels)'),
        ({'model.backbone.in_channels': 5}, '5 channels (model.backbone.in_channels)'),
        (
            {'model.data_preprocessor.mean': [0.0] * 5, 'model.data_preprocessor.std': [1.0] * 5},
            '5 channels (model.data_preprocessor.mean)',
        ),
    ],
)
def test_images_with_other_than_three_channels_are_refused(changes: dict[str, Any], part: str, repo: Path) -> None:
    with pytest.raises(UserError) as caught:
        check_supported(retinanet(**changes).model)
    message = str(caught.value)
    assert message.startswith(f'RetinaNet is not supported with images of {part}: ')
    page = re.sub(r'\s+', ' ', (repo / 'docs/zoo.md').read_text())
    assert message.partition('): ')[2] in page


def test_one_mean_for_all_channels_of_a_color_image_is_supported() -> None:
    check_supported(retinanet(**{'model.data_preprocessor.mean': [127.5], 'model.data_preprocessor.std': [58.0]}).model)


def test_maskformer_that_predicts_no_instances_is_refused(repo: Path) -> None:
    register_all_modules()
    cfg = Config.fromfile(CONFIGS / 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py')
    check_supported(cfg.model)
    cfg.model.test_cfg.instance_on = False
    with pytest.raises(UserError, match='Set model.test_cfg.instance_on=True') as caught:
        check_supported(cfg.model)
    assert str(caught.value) in re.sub(r'\s+', ' ', (repo / 'docs/zoo.md').read_text())


def test_detectors_of_the_zoo_are_supported() -> None:
    register_all_modules()
    for family in FAMILIES:
        cfg = Config.fromfile(CONFIGS / family.config)
        cfg.merge_from_dict(copy.deepcopy(dict(family.changes)))
        check_supported(cfg.model)
    check_supported(dict(type='NotRegistered'))
    check_supported({})
