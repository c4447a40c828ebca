# SPDX-License-Identifier: Apache-2.0
"""Models that are no detectors of fixed categories in single images are refused by name, with the reason."""

from __future__ import annotations

import re
from pathlib import Path

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
    'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    'soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
    'fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py',
    'rpn/rpn_r50_fpn_1x_coco.py',
)


@pytest.mark.parametrize('config', UNSUPPORTED)
def test_the_page_quotes_the_message_of_every_unsupported_kind(config: str, repo: Path) -> None:
    register_all_modules()
    cfg = Config.fromfile(CONFIGS / config)
    cfg.merge_from_dict(dict(zsq=dict(), work_dir='work'))
    with pytest.raises(UserError, match='is not supported: ') as caught:
        compose(cfg)
    page = re.sub(r'\s+', ' ', (repo / 'docs/zoo.md').read_text())
    assert str(caught.value) in page


def test_detectors_of_the_zoo_are_supported() -> None:
    register_all_modules()
    for family in FAMILIES:
        check_supported(Config.fromfile(CONFIGS / family.config).model)
    check_supported(dict(type='NotRegistered'))
    check_supported({})
