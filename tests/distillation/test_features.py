# SPDX-License-Identifier: Apache-2.0
"""The feature loss against values computed by hand, its memory, and the default features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from torch import Tensor, nn

from mmzsq.distillation import FeatureMSELoss, feature_modules, transformer_blocks
from mmzsq.distillation.features import mean_squared_error
from mmzsq.errors import UserError


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.bbox_head = nn.Conv2d(4, 6, 1)


def test_feature_mse_is_the_mean_over_the_selected_layers() -> None:
    detector = Detector()
    student = {'backbone.0': [torch.zeros(1, 4, 2, 2)], 'backbone.1': [torch.zeros(1, 4, 2, 2)], 'bbox_head': []}
    teacher = {
        'backbone.0': [torch.full((1, 4, 2, 2), 2.0)],
        'backbone.1': [torch.full((1, 4, 2, 2), 4.0)],
        'bbox_head': [torch.ones(1)],
    }
    loss = FeatureMSELoss(['backbone.*'], loss_weight=0.5)
    student['backbone.2'] = teacher['backbone.2'] = [torch.zeros(1)]
    assert float(loss(student, teacher, detector)) == pytest.approx(0.5 * (4 + 16 + 0) / 3)


def test_normalized_feature_mse_does_not_depend_on_a_layers_scale() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 4, 3, 3)
    loss = FeatureMSELoss(['backbone.0'], normalize=True)
    small = loss({'backbone.0': [student]}, {'backbone.0': [teacher]}, Detector())
    large = loss({'backbone.0': [100 * student]}, {'backbone.0': [100 * teacher]}, Detector())
    torch.testing.assert_close(small, large)
    assert float(small) == pytest.approx(float(((student - teacher) ** 2).mean() / (teacher**2).mean()))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_the_error_is_that_of_fp32_copies_and_keeps_none(dtype: torch.dtype) -> None:
    student, teacher = torch.randn(2, 3, 4, 5).to(dtype).unbind(0)
    student = student.clone().requires_grad_()
    expected = nn.functional.mse_loss(student.float(), teacher.float())
    [gradient] = torch.autograd.grad(3 * expected, student)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        error = mean_squared_error(student, teacher)
    assert {tensor.data_ptr() for tensor in kept} == {student.data_ptr(), teacher.data_ptr()}
    (3 * error).backward()
    assert torch.equal(error, expected) and error.dtype == torch.float32
    torch.testing.assert_close(student.grad, gradient)


# Default features.


def of_type(detector: nn.Module, name: str) -> list[str]:
    return [n for n, module in detector.named_modules() if type(module).__name__ == name]


def test_all_batchnorms_of_yolov5_and_nothing_else(tiny_cfg: Callable[[str], Any]) -> None:
    detector = MODELS.build(tiny_cfg('yolov5'))
    assert FeatureMSELoss().taps(detector) == of_type(detector, 'BatchNorm2d')


@pytest.mark.parametrize('name', ['mask-rcnn_r18', 'faster-rcnn_r18', 'retinanet_r18'])
def test_batchnorms_of_a_resnet_and_its_pyramid_as_a_whole(tiny_cfg: Callable[[str], Any], name: str) -> None:
    detector = MODELS.build(tiny_cfg(name))
    assert FeatureMSELoss().taps(detector) == [*of_type(detector, 'BatchNorm2d'), 'neck']


def test_every_block_of_swin_and_its_pyramid_as_a_whole(tiny_cfg: Callable[[str], Any]) -> None:
    detector = MODELS.build(tiny_cfg('mask-rcnn_swin'))
    blocks = of_type(detector, 'SwinBlock')
    assert len(blocks) == 5
    assert FeatureMSELoss().taps(detector) == [*blocks, 'neck']
    detector.neck = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    assert feature_modules(detector) == [*blocks, 'neck.1']


def test_batchnorm_of_the_roi_head_is_not_compared(tiny_cfg: Callable[[str], Any]) -> None:
    cfg = tiny_cfg('mask-rcnn_r18')
    cfg.roi_head.mask_head.norm_cfg = dict(type='BN')
    detector = MODELS.build(cfg)
    assert any(name.startswith('roi_head') for name in of_type(detector, 'BatchNorm2d'))
    assert not any(name.startswith('roi_head') for name in feature_modules(detector))


def test_parts_of_a_mask_head_are_features_beside_a_box_head() -> None:
    """Beside a box head, the mask head sees selected locations; without one, it is a prediction head."""
    detector = Detector()
    detector.mask_head = nn.ModuleDict(dict(prototypes=nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU()), loss=nn.L1Loss()))
    assert feature_modules(detector) == ['backbone.1', 'mask_head.prototypes']
    del detector.bbox_head
    assert feature_modules(detector) == ['backbone.1']


def test_transformer_blocks_are_found_by_structure() -> None:
    torchs = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    assert transformer_blocks(torchs) == ['layers.0', 'layers.1']
    pyramid = MODELS.build(
        dict(
            type='PyramidVisionTransformerV2',
            embed_dims=8,
            num_layers=[1, 2, 1, 1],
            num_heads=[1, 1, 1, 1],
            init_cfg=None,
        )
    )
    assert transformer_blocks(pyramid) == of_type(pyramid, 'PVTEncoderLayer')
    assert len(transformer_blocks(pyramid)) == 5
    assert transformer_blocks(nn.Sequential(nn.Linear(4, 4), nn.MultiheadAttention(4, 1))) == []


def test_error_without_default_features_asks_for_module_names() -> None:
    with pytest.raises(UserError, match='modules='):
        feature_modules(nn.Sequential(nn.Conv2d(3, 3, 1)))
