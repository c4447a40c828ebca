# SPDX-License-Identifier: Apache-2.0
"""Converted detectors compute what torchvision's own models compute, with random weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.ops.misc import FrozenBatchNorm2d

from mmzsq.converters.files import TORCHVISION_CONFIGS
from mmzsq.converters.torchvision import UNNAMED, convert_torchvision
from mmzsq.errors import UserError

BUILDERS: dict[str, Any] = {
    'Faster R-CNN': detection.fasterrcnn_resnet50_fpn,
    'Mask R-CNN': detection.maskrcnn_resnet50_fpn,
    'RetinaNet': detection.retinanet_resnet50_fpn,
}
# 96 rows have 2 rows at P6, where torchvision's stride is 48 pixels.
HEIGHT, WIDTH = 96, 128
FEWER: dict[str, dict[str, int]] = {
    'Faster R-CNN': dict(rpn_post_nms_top_n_test=100, box_detections_per_img=30),
    'Mask R-CNN': dict(rpn_post_nms_top_n_test=100, box_detections_per_img=30),
    'RetinaNet': {},
}


def upstream(family: str, num_classes: int, eps: float) -> nn.Module:
    """Build torchvision's model with weights that give spread-out scores."""
    torch.manual_seed(0)
    model = BUILDERS[family](
        weights=None,
        weights_backbone=None,
        num_classes=num_classes,
        min_size=HEIGHT,
        max_size=WIDTH,
        **FEWER[family],
    ).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = eps
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            # Some variances are so small that the epsilon matters.
            nn.init.uniform_(module.running_var, 0.5, 1.0)
            module.running_var[0] = 2e-5
            nn.init.uniform_(module.weight, 0.2, 0.4)
            module.weight.data[0] = 1e-3
    for name, parameter in model.named_parameters():
        if name.endswith(('cls_logits.weight', 'cls_score.weight', 'mask_fcn_logits.weight', 'bbox_reg.weight')):
            nn.init.normal_(parameter, std=0.1 if 'rpn' not in name else 0.02)
        if name.endswith('cls_logits.bias'):
            nn.init.constant_(parameter, -1.0)
    return model


def state_dict(model: nn.Module, frozen: bool) -> dict[str, Tensor]:
    """Return the state dict, as a model with ``FrozenBatchNorm2d`` would save it if ``frozen``."""
    return {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not (frozen and name.endswith('num_batches_tracked'))
    }


def ours(repo: Path, family: str, tensors: Mapping[str, Tensor]) -> tuple[Any, int]:
    """Convert weights and load them strictly into the model of the config."""
    register_all_modules()
    converted = convert_torchvision(tensors)
    assert converted.family == family
    cfg = Config.fromfile(repo / f'configs/torchvision/{TORCHVISION_CONFIGS[family]}.py').model
    if family == 'RetinaNet':
        cfg.bbox_head.num_classes = converted.num_classes
    else:
        cfg.test_cfg.rpn.max_per_img, cfg.test_cfg.rcnn.max_per_img = 100, 30
        for head in cfg.roi_head.values():
            if isinstance(head, dict) and 'num_classes' in head:
                head.num_classes = converted.num_classes
    model = MODELS.build(cfg).eval()
    model.load_state_dict(converted.state_dict, strict=True)
    return model, converted.num_classes


@torch.no_grad()
def both(repo: Path, family: str, num_classes: int = 4, frozen: bool = True) -> tuple[Any, Any, Any, Any]:
    """Run both models on an image, and return inputs and detections."""
    reference = upstream(family, num_classes, 0.0 if frozen else 1e-5)
    model, _ = ours(repo, family, state_dict(reference, frozen))
    image = torch.randint(0, 256, (3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    sample = DetDataSample(
        metainfo=dict(
            img_shape=(HEIGHT, WIDTH), ori_shape=(HEIGHT, WIDTH), scale_factor=(1.0, 1.0), pad_shape=(HEIGHT, WIDTH)
        )
    )
    # Images are BGR in MMDetection.
    data = model.data_preprocessor(dict(inputs=[image.flip(0)], data_samples=[sample]))
    expected = reference([image / 255])[0]
    detections = model.predict(data['inputs'], data['data_samples'], rescale=True)[0].pred_instances
    return reference, model, (image, data), (expected, detections)


@pytest.mark.parametrize(
    # Mask R-CNN has all parts of Faster R-CNN.
    'family',
    [pytest.param('Faster R-CNN', marks=pytest.mark.nightly), 'Mask R-CNN', 'RetinaNet'],
)
def test_detections_and_raw_outputs_are_those_of_torchvision(repo: Path, family: str) -> None:
    with torch.no_grad():
        reference, model, (image, data), (expected, detections) = both(repo, family)
        features = reference.backbone(reference.transform([image / 255])[0].tensors)
        maps = model.extract_feat(data['inputs'])
        for theirs, own in zip(features.values(), maps, strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-4)
        if family == 'RetinaNet':
            raw = reference.head(list(features.values()))
            logits, deltas = model.bbox_head(maps)
            own_logits = torch.cat([level.permute(0, 2, 3, 1).reshape(1, -1, 3) for level in logits], 1)
            torch.testing.assert_close(own_logits, raw['cls_logits'][..., 1:], rtol=1e-3, atol=1e-3)
            own_deltas = torch.cat([level.permute(0, 2, 3, 1).reshape(1, -1, 4) for level in deltas], 1)
            torch.testing.assert_close(own_deltas, raw['bbox_regression'], rtol=1e-3, atol=1e-3)
    # torchvision's RetinaNet also detects class 0, the background, which the converted model lacks.
    kept = expected['labels'] > 0
    assert kept.sum() > 20
    if family != 'RetinaNet':
        assert len(detections) == len(kept)
    # Pair by box, score and label, because equal scores have no order.
    theirs = torch.cat(
        [expected['boxes'], 100 * expected['scores'][:, None], 1000.0 * (expected['labels'][:, None] - 1)], 1
    )[kept]
    own = torch.cat([detections.bboxes, 100 * detections.scores[:, None], 1000.0 * detections.labels[:, None]], 1)
    distances = (theirs[:, None] - own[None]).abs().amax(-1).amin(1)
    assert (distances < 0.05).float().mean() > 0.97
    if family == 'Mask R-CNN':
        with torch.no_grad():
            boxes = expected['boxes']
            pooled = reference.roi_heads.mask_roi_pool(features, [boxes], [(HEIGHT, WIDTH)])
            logits = reference.roi_heads.mask_predictor(reference.roi_heads.mask_head(pooled))
            rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], 1)
            mask_logits = model.roi_head._mask_forward(maps, rois)['mask_preds']
        torch.testing.assert_close(mask_logits, logits[:, 1:], rtol=1e-3, atol=1e-3)


def test_anchors_are_those_of_torchvision(repo: Path) -> None:
    reference = upstream('RetinaNet', 4, 0.0)
    model, _ = ours(repo, 'RetinaNet', state_dict(reference, True))
    sizes = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]
    own = torch.cat(model.bbox_head.prior_generator.grid_priors(sizes, device='cpu'))
    images = detection.image_list.ImageList(torch.zeros(1, 3, HEIGHT, WIDTH), [(HEIGHT, WIDTH)])
    theirs = reference.anchor_generator(images, [torch.zeros(1, 1, *size) for size in sizes])[0]
    assert torch.equal(own, theirs)


def test_91_outputs_become_the_classes_of_coco() -> None:
    tensors = state_dict(upstream('Faster R-CNN', 91, 0.0), True)
    converted = convert_torchvision(tensors)
    assert converted.num_classes == 80
    scores = tensors['roi_heads.box_predictor.cls_score.bias']
    # Category 13 is the stop sign, the twelfth name; 90 is the toothbrush, the last one.
    own = converted.state_dict['roi_head.bbox_head.fc_cls.bias']
    assert own[11] == scores[13]
    assert own[79] == scores[90]
    assert own[80] == scores[0]
    assert not set(UNNAMED) & {1, 13, 90}


def test_names_of_old_versions_are_read() -> None:
    tensors = state_dict(upstream('Mask R-CNN', 4, 0.0), True)
    expected = convert_torchvision(tensors).state_dict
    old = {}
    for name, value in tensors.items():
        name = name.replace('rpn.head.conv.0.0.', 'rpn.head.conv.')
        for block in ('inner_blocks', 'layer_blocks'):
            for index in range(4):
                name = name.replace(f'{block}.{index}.0.', f'{block}.{index}.')
        for index in range(4):
            name = name.replace(f'mask_head.{index}.0.', f'mask_head.mask_fcn{index + 1}.')
        old[name] = value
    assert old.keys() != tensors.keys()
    found = convert_torchvision(old).state_dict
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ('build', 'message'),
    [
        (detection.fasterrcnn_resnet50_fpn_v2, '_v2'),
        (detection.retinanet_resnet50_fpn_v2, 'v2'),
        (detection.fcos_resnet50_fpn, 'FCOS'),
        (detection.keypointrcnn_resnet50_fpn, 'Keypoint'),
        (detection.fasterrcnn_mobilenet_v3_large_fpn, 'ResNet-50'),
    ],
)
def test_other_detectors_are_refused_by_name(build: Any, message: str) -> None:
    with torch.device('meta'):
        model = build(weights=None, weights_backbone=None)
    with pytest.raises(UserError, match=message):
        convert_torchvision(model.state_dict())


def smallest(variance: float, counted: bool) -> dict[str, Tensor]:
    """The tensors that tell a RetinaNet, with one batch norm of which a channel has a variance."""
    torch.manual_seed(0)
    tensors = {
        'backbone.body.layer1.0.conv2.weight': torch.zeros(64, 64, 3, 3),
        'backbone.body.layer1.0.conv3.weight': torch.zeros(1),
        'backbone.fpn.extra_blocks.p6.weight': torch.zeros(1, 256),
        'head.classification_head.cls_logits.weight': torch.zeros(27, 1),
        'head.classification_head.cls_logits.bias': torch.zeros(27),
        'backbone.body.bn1.weight': torch.tensor([0.5, 0.1, 0.0]),
        'backbone.body.bn1.bias': torch.randn(3),
        'backbone.body.bn1.running_mean': torch.randn(3),
        'backbone.body.bn1.running_var': torch.tensor([0.8, variance, 1e-12]),
    }
    if counted:
        tensors['backbone.body.bn1.num_batches_tracked'] = torch.tensor(7)
    return tensors


@pytest.mark.parametrize(
    ('variance', 'counted', 'given', 'eps', 'assumed'),
    [
        # As in torchvision's COCO weights, which a state dict does not tell.
        (2e-5, False, None, 0.0, True),
        # BatchNorm2d counts its batches.
        (2e-5, True, None, 1e-5, False),
        # The gain would be 1e5.
        (1e-12, False, None, 1e-5, False),
        (0.0, False, None, 1e-5, False),
        (2e-5, False, 1e-5, 1e-5, False),
        (2e-5, True, 1e-3, 1e-3, False),
    ],
)
def test_batch_norms_have_the_epsilon_of_the_model(
    variance: float, counted: bool, given: float | None, eps: float, assumed: bool
) -> None:
    tensors = smallest(variance, counted)
    converted = convert_torchvision(tensors, eps=given)
    assert ('--batch-norm-eps 1e-5' in converted.note) == assumed
    reference = FrozenBatchNorm2d(3, eps=eps)
    own = nn.BatchNorm2d(3).eval()
    names = ('weight', 'bias', 'running_mean', 'running_var')
    reference.load_state_dict({name: tensors[f'backbone.body.bn1.{name}'] for name in names})
    own.load_state_dict(
        {name: converted.state_dict[f'backbone.bn1.{name}'] for name in (*names, 'num_batches_tracked')}
    )
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(own(images), reference(images), rtol=1e-5, atol=1e-5)


def test_an_epsilon_without_a_finite_output_is_refused() -> None:
    with pytest.raises(UserError, match='running_var holds 0'):
        convert_torchvision(smallest(0.0, False), eps=0.0)
