# SPDX-License-Identifier: Apache-2.0
"""Each size of YOLO26 equals Ultralytics' own model, if the package ``ultralytics`` is installed.

Compared are the outputs, detections and loss of the branch with one location per object. Both models hold the same
weights: random ones, with BatchNorm statistics near those of random images. Tried with ultralytics 8.4.190.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import Tensor, nn
from upstream_yolo import CLASSES, PLACES, SIZE, instances, raw_outputs, upstream_batch, upstream_model

from mmzsq.converters.yolo26 import SIZES, convert_yolo26
from mmzsq.models.padded_targets import pad_targets

TOLERANCE = 1e-4


class Pair(NamedTuple):
    """The two models and the outputs of Ultralytics' model for two images; ``raw`` is (N, 4 + C, P)."""

    upstream: nn.Module
    ours: nn.Module
    images: Tensor
    detections: Tensor
    raw: Tensor


@pytest.fixture(scope='module')
def ultralytics(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package. Its settings file is written to a temporary folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('YOLO_CONFIG_DIR', str(tmp_path_factory.mktemp('settings')))
        return pytest.importorskip('ultralytics', minversion='8.4')


@pytest.fixture(scope='module', params=list(SIZES))
def pair(request: pytest.FixtureRequest, ultralytics: Any, repo: Path) -> Pair:
    size = request.param
    upstream = upstream_model(f'yolo26{size}')
    register_all_modules()
    cfg = Config.fromfile(repo / f'configs/yolo26/yolo26-{size}_coco.py').model
    cfg.bbox_head.num_classes = CLASSES
    ours = MODELS.build(cfg).eval()
    converted = convert_yolo26(upstream.state_dict())
    assert (converted.size, converted.num_classes) == (size, CLASSES)
    ours.load_state_dict(converted.state_dict)
    images = torch.rand(2, 3, *SIZE)
    # As its predictor does.
    upstream.model[-1].end2end = True
    with torch.no_grad():
        outputs = upstream(images)
    return Pair(upstream, ours, images, outputs[0], raw_outputs(outputs))


def test_the_number_of_parameters_is_that_of_one_branch(pair: Pair) -> None:
    head = pair.upstream.model[-1]
    branch = sum(parameter.numel() for part in (head.cv2, head.cv3) for parameter in part.parameters())
    whole = sum(parameter.numel() for parameter in pair.upstream.parameters())
    assert sum(parameter.numel() for parameter in pair.ours.parameters()) == whole - branch


def test_raw_outputs_are_the_same(pair: Pair) -> None:
    with torch.no_grad():
        (maps,) = pair.ours(pair.images, mode='tensor')
    assert all(0.3 < scale_map.std(dim=2).mean() < 4 for scale_map in pair.raw.split(PLACES, dim=2))
    assert (torch.cat([m.flatten(2) for m in maps], 2) - pair.raw).abs().max() < TOLERANCE


def test_detections_are_the_same_without_nms(pair: Pair) -> None:
    with torch.no_grad():
        (maps,) = pair.ours(pair.images, mode='tensor')
    # Boxes are not clipped: Ultralytics clips them later.
    bboxes, _, cls_logits = pair.ours.bbox_head.dense_predictions(maps)
    scores = cls_logits.sigmoid()
    for image, expected in enumerate(pair.detections):
        found = pair.ours.bbox_head.post_processor(bboxes[image], scores.new_ones(len(scores[image])), scores[image])
        count = min(len(found), len(expected))
        assert count > 50
        torch.testing.assert_close(found.scores[:count], expected[:count, 4], rtol=0, atol=TOLERANCE)
        same = (found.labels[:count] == expected[:count, 5]) & (
            (found.bboxes[:count] - expected[:count, :4]).abs().amax(1) < 32 * TOLERANCE
        )
        # The order of nearly equal scores may differ.
        assert same.float().mean() > 0.9


@pytest.mark.parametrize('smallest', [2, 20])
def test_the_loss_and_its_gradient_are_the_same(pair: Pair, smallest: float) -> None:
    from ultralytics.utils.loss import v8DetectionLoss

    torch.manual_seed(smallest)
    wanted = instances(smallest=smallest)
    images = pair.images.clone().requires_grad_()
    criterion = v8DetectionLoss(pair.upstream, tal_topk=7, tal_topk2=1)
    total, items = criterion.loss(pair.upstream(images)[1]['one2one'], upstream_batch(wanted))
    # Ultralytics multiplies the loss by the batch size.
    (expected_grad,) = torch.autograd.grad(total.sum() / len(images), images)
    (maps,) = pair.ours(images, mode='tensor')
    losses = pair.ours.bbox_head.loss_by_targets(maps, pad_targets(wanted))
    (grad,) = torch.autograd.grad(sum(losses.values()), images)
    for name, expected in zip(('loss_bbox', 'loss_cls', 'loss_l1'), items.values(), strict=True):
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-4)
        assert expected > 0.01
    assert (grad - expected_grad).norm() < 1e-3 * expected_grad.norm()
