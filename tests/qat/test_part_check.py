# SPDX-License-Identifier: Apache-2.0
"""Before a training with updates in parts, the log names the losses that are not those of one batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from update_gradients import SIZE, labels

from mmzsq.patching import patched
from mmzsq.qat.part_check import log_part_check, part_differences
from mmzsq.tasks.detection_task import data_samples


@pytest.fixture
def detector(tiny_cfg: Callable[[str], Any]) -> Any:
    detector = MODELS.build(tiny_cfg('retinanet_r18'))
    detector.init_weights()
    return detector


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(3, 3, *SIZE)


@pytest.fixture
def samples() -> list[Any]:
    """One, three and no objects."""
    return data_samples([labels(1, False), labels(3, False), labels(0, False)], SIZE, torch.device('cpu'))


def hide_divisor(detector: Any) -> Any:
    """Let one of the losses divide by a number of objects where no division shows it."""
    loss_by_feat = detector.bbox_head.loss_by_feat

    def hidden(cls_scores: Any, bbox_preds: Any, batch_gt_instances: Any, *args: Any, **kwargs: Any) -> Any:
        losses = loss_by_feat(cls_scores, bbox_preds, batch_gt_instances, *args, **kwargs)
        objects = torch.tensor([float(len(instances)) for instances in batch_gt_instances]).sum()
        return dict(losses, loss_hidden=cls_scores[0].square().sum() * objects.reciprocal())

    return patched(detector.bbox_head, 'loss_by_feat', hidden)


def test_losses_of_mmdetection_are_those_of_one_batch(detector: Any, inputs: torch.Tensor, samples: list[Any]) -> None:
    before, state = [len(sample.gt_instances) for sample in samples], torch.get_rng_state()
    buffers = copy.deepcopy(dict(detector.named_buffers()))
    differences, random = part_differences(detector, inputs[:2], samples[:2])
    assert differences.keys() == {'loss_cls', 'loss_bbox'}
    assert max(differences.values()) < 1e-4
    assert random == set()
    assert [len(sample.gt_instances) for sample in samples] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in detector.named_buffers())


def test_a_loss_with_an_unknown_divisor_is_named(
    detector: Any, inputs: torch.Tensor, samples: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr('mmzsq.qat.part_check.print_log', lambda text, logger, level: warnings.append(text))
    with hide_divisor(detector):
        log_part_check(detector, inputs, samples)
    assert len(warnings) == 1
    assert 'loss_hidden (differs by ' in warnings[0]
    assert 'loss_cls' not in warnings[0]
    assert 'zsq.train.accumulate=1' in warnings[0]


def test_random_losses_are_not_compared(detector: Any, inputs: torch.Tensor, samples: list[Any]) -> None:
    loss_by_feat = detector.bbox_head.loss_by_feat
    with patched(
        detector.bbox_head,
        'loss_by_feat',
        lambda *args, **kwargs: dict(loss_by_feat(*args, **kwargs), loss_noise=torch.rand(())),
    ):
        assert part_differences(detector, inputs[:2], samples[:2])[1] == {'loss_noise'}


def test_images_with_equally_many_objects_show_a_divisor(detector: Any, inputs: torch.Tensor) -> None:
    equal = data_samples([labels(3, False), labels(3, False)], SIZE, torch.device('cpu'))
    with hide_divisor(detector):
        assert part_differences(detector, inputs[:2], equal)[0]['loss_hidden'] > 0.1
