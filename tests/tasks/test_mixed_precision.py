# SPDX-License-Identifier: Apache-2.0
"""Under autocast, a network runs in 16 bits and everything else of its loss in fp32, in any head."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mmdet.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn import functional as F

from mmzsq.tasks import DetectionTask
from mmzsq.tasks.mixed_precision import LossPrecision, autocast_dtype, autocast_network_only, to_fp32

BF16, FP32 = torch.bfloat16, torch.float32


def autocast() -> torch.autocast:
    return torch.autocast('cpu', BF16)


class Head(nn.Module):
    """A head whose loss is written inline, with operations that autocast breaks, and calls its own layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 4, 1)
        self.refine = nn.Linear(4, 4)
        self.seen: dict[str, Any] = {}

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
        maps = [self.conv(level) for level in features]
        self.seen['inside'] = maps[0].dtype
        return maps, dict(first=maps[0])

    def anything(self, features: list[Tensor]) -> dict[str, Tensor]:
        maps, named = self(features)
        rows = maps[0].flatten(2).transpose(1, 2)
        refined = self.refine(rows)
        product = refined @ refined.new_ones(4, 1)
        self.seen.update(maps=maps[0].dtype, named=named['first'].dtype, refined=refined.dtype, product=product.dtype)
        targets = torch.zeros(rows.shape)
        targets[:, :2] = refined[:, :2].detach()
        scores = product.sigmoid()
        return dict(loss=F.binary_cross_entropy(scores, torch.ones_like(scores)) + targets.mean())


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
        self.bbox_head = Head()
        self.bbox_head.num_classes = 4  # type: ignore[assignment]
        self.data_preprocessor = nn.Module()

    def extract_feat(self, inputs: Tensor) -> list[Tensor]:
        return [self.backbone(inputs)]

    def loss(self, inputs: Tensor, samples: Any) -> dict[str, Tensor]:
        features = self.extract_feat(inputs)
        self.bbox_head.seen['features'] = features[0].dtype
        return self.bbox_head.anything(features)


@pytest.fixture(autouse=True)
def strict_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make autocast on the CPU refuse the function that autocast on CUDA refuses."""
    original = F.binary_cross_entropy

    def refuse(*args: Any, **kwargs: Any) -> Tensor:
        if torch.is_autocast_enabled('cpu'):
            raise RuntimeError('torch.nn.functional.binary_cross_entropy is unsafe to autocast')
        return original(*args, **kwargs)

    monkeypatch.setattr(F, 'binary_cross_entropy', refuse)


def test_layers_run_in_16_bits_and_all_else_in_fp32() -> None:
    detector, images = Detector(), torch.rand(2, 3, 8, 8)
    with autocast():
        with pytest.raises(RuntimeError, match='dtypes match|unsafe'):
            detector.loss(images, None)
        with autocast_network_only(detector):
            loss = detector.loss(images, None)['loss']
    assert detector.bbox_head.seen == dict(
        features=FP32, inside=BF16, maps=FP32, named=FP32, refined=FP32, product=FP32
    )
    expected = detector.loss(images, None)['loss']
    assert loss.dtype == FP32
    assert loss != expected
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0.02)


def test_outputs_of_the_loss_s_own_layers_are_rounded_to_16_bits_once() -> None:
    """The linear layer that the loss calls runs in 16 bits; the product that the loss computes does not."""
    detector = Detector()
    rows = torch.randn(5, 4)
    with autocast(), autocast_network_only(detector):
        refined = detector.bbox_head.refine(rows)
        product = refined @ rows.T
    weight, bias = detector.bbox_head.refine.weight.bfloat16(), detector.bbox_head.refine.bias.bfloat16()
    assert torch.equal(refined, F.linear(rows.bfloat16(), weight, bias).float())
    assert torch.equal(product, refined @ rows.T)


def test_nothing_is_replaced_after_the_block_or_without_autocast() -> None:
    detector = Detector()
    with autocast_network_only(detector):
        assert not any('forward' in vars(module) for module in detector.modules())
    replaced = detector.bbox_head.forward
    detector.bbox_head.forward = lambda features: replaced([2 * level for level in features])
    kept = detector.bbox_head.forward
    with autocast():
        with autocast_network_only(detector):
            assert autocast_dtype('cpu') is None
            doubled = detector.bbox_head([torch.ones(1, 8, 1, 1)])[0][0]
        assert autocast_dtype('cpu') == BF16
    assert detector.bbox_head.forward is kept
    assert [name for name, module in detector.named_modules() if 'forward' in vars(module)] == ['bbox_head']
    torch.testing.assert_close(doubled, replaced([torch.full((1, 8, 1, 1), 2.0)])[0][0], rtol=0.02, atol=0.02)


def test_nested_outputs_are_converted_and_other_values_kept() -> None:
    half, double, index = torch.ones(2, dtype=BF16), torch.ones(2, dtype=torch.float64), torch.arange(2)
    found = to_fp32([(half, dict(a=half, n=3)), InstanceData(bboxes=half, labels=index), double, None])
    (first, mapping), instances, kept, nothing = found
    assert first.dtype == mapping['a'].dtype == instances.bboxes.dtype == FP32
    assert mapping['n'] == 3 and instances.labels is index and kept is double and nothing is None


def test_real_heads_get_fp32_targets_and_a_gradient(tiny_cfg: Callable[[str], Any]) -> None:
    """Cascades refine boxes inside their losses; their coordinates are exact only in fp32."""
    task = DetectionTask(MODELS.build(tiny_cfg('cascade-rcnn_r18')))
    roi_head = task.detector.roi_head
    seen: list[torch.dtype] = []
    refine = roi_head.bbox_head[0].refine_bboxes

    def note(sampling_results: Any, bbox_results: dict[str, Any], metas: Any) -> Any:
        seen.extend([bbox_results['rois'].dtype, bbox_results['bbox_pred'].dtype, bbox_results['cls_score'].dtype])
        return refine(sampling_results, bbox_results, metas)

    roi_head.bbox_head[0].refine_bboxes = note
    boxes = torch.tensor([[5.0, 6.0, 40.0, 50.0]])
    label = InstanceData(bboxes=boxes, labels=torch.tensor([1]))
    images = torch.rand(1, 3, 64, 96, requires_grad=True)
    torch.manual_seed(0)
    with autocast():
        loss = task.loss(images, task.data_samples([label], (64, 96)))
    assert set(seen) == {FP32}
    assert task.loss_precision.fp32_reason is None
    assert torch.autograd.grad(loss, images)[0].abs().sum() > 0


class FragileNetwork(nn.Module):
    """A network with a fault in 16 bits."""

    def __init__(self, fault: str, in_fp32_too: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.fault, self.in_fp32_too = fault, in_fp32_too
        self.dtypes: list[torch.dtype] = []

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.layer(images)
        self.dtypes.append(out.dtype)
        if out.dtype == BF16 or self.in_fp32_too:
            if self.fault == 'error':
                raise ValueError('matrix contains invalid numeric entries')
            out = out / 0 if self.fault == 'value' else out + (out - out).sqrt()
        return out + torch.rand(())


class Fragile(nn.Module):
    def __init__(self, fault: str, in_fp32_too: bool = False) -> None:
        super().__init__()
        self.network = FragileNetwork(fault, in_fp32_too)
        self.dtypes = self.network.dtypes

    def loss(self, images: Tensor) -> Tensor:
        return self.network(images).mean() + 0 * torch.rand(())


@pytest.mark.parametrize(
    ('fault', 'reason'),
    [
        ('error', 'ValueError: matrix contains invalid numeric entries'),
        ('value', 'the loss is (-?inf|nan)'),
        ('gradient', 'the gradient of the images is not finite'),
    ],
)
def test_a_loss_that_16_bits_break_falls_back_to_fp32_with_one_warning(fault: str, reason: str) -> None:
    detector, images = Fragile(fault), torch.rand(3, 4, requires_grad=True)
    precision = LossPrecision(detector)
    torch.manual_seed(5)
    with autocast(), pytest.warns(UserWarning, match=f'Fragile is computed in fp32.*{reason}'):
        loss = precision(lambda: detector.loss(images), images)
    torch.manual_seed(5)
    # The random numbers are those of a first call.
    assert torch.equal(loss, detector.loss(images))
    assert detector.dtypes == [BF16, FP32, FP32]
    with autocast(), warnings.catch_warnings():
        warnings.simplefilter('error')
        precision(lambda: detector.loss(images), images)
    assert detector.dtypes[-1] == FP32 and len(detector.dtypes) == 4


def test_errors_that_fp32_has_too_are_raised_and_change_nothing() -> None:
    detector, images = Fragile('error', in_fp32_too=True), torch.rand(3, 4)
    precision = LossPrecision(detector)
    with autocast(), pytest.raises(ValueError, match='invalid numeric'):
        precision(lambda: detector.loss(images), images)
    assert precision.fp32_reason is None
    detector = Fragile('value', in_fp32_too=True)
    precision = LossPrecision(detector)
    with autocast(), warnings.catch_warnings():
        warnings.simplefilter('error')
        assert not torch.isfinite(precision(lambda: detector.loss(images), images))
    assert precision.fp32_reason is None


def test_the_fallback_leaves_layers_with_16_bit_weights_out() -> None:
    """Synthesis on a GPU replaces forwards by some that hold weights in bf16."""
    detector, images = Fragile('error'), torch.rand(3, 4)
    weight, bias = detector.network.layer.weight.bfloat16(), detector.network.layer.bias.bfloat16()

    def accelerated(x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), weight, bias)

    detector.network.layer.forward = accelerated  # type: ignore[method-assign]
    precision = LossPrecision(detector)
    with autocast(), pytest.warns(UserWarning, match='computed in fp32'):
        precision(lambda: detector.loss(images), images)
    assert detector.dtypes == [BF16, FP32]
    assert detector.network.layer.forward is accelerated


def test_without_autocast_the_loss_is_computed_as_it_is() -> None:
    detector, images = Fragile('error'), torch.rand(3, 4)
    detector.network.layer.bfloat16()
    with pytest.raises(ValueError, match='invalid numeric'):
        LossPrecision(detector)(lambda: detector.loss(images.bfloat16()), images)
