# SPDX-License-Identifier: Apache-2.0
"""The loss of MMDetection's dense heads against their own decoding, torch.distributions and values computed by hand."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
from families import DENSE, MASKS
from harness import zoo_config
from mmdet.models.dense_heads import CenterNetHead, RTMDetInsHead, SOLOHead
from mmdet.models.utils import relative_coordinate_maps
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical
from torch.distributions import kl_divergence as reference_kl

import mmzsq.qat  # noqa: F401  registers the operators of deformable convolutions
from mmzsq.distillation import LocationPredictionLoss, flatten_tensors
from mmzsq.distillation import locations as module
from mmzsq.distillation.location_outputs import Constants, LocationOutputs, MaskGroup, joint_logits, linear_masks, rows
from mmzsq.distillation.location_readers import location_reader
from mmzsq.distillation.locations import location_terms
from mmzsq.errors import UserError
from mmzsq.models.train_eval_modes import frozen_train_mode
from mmzsq.patching import patched

FAMILIES = {family.name: family for family in (*DENSE, *MASKS)}
SIZE = 128
FAR = 10**5
"""Side of an image that no box leaves to the right or below."""


@cache
def config(name: str) -> Any:
    register_all_modules()
    family = FAMILIES[name]
    return zoo_config(family.config, family.size, family.shrink, family.changes).model


def build(name: str) -> Any:
    """Return the heads of a family with random weights, in a stand-in of its detector."""
    model = config(name)
    torch.manual_seed(0)
    detector = nn.Module()
    for part in ('bbox_head', 'mask_head'):
        if part in model:
            settings = dict(
                copy.deepcopy(model[part]), train_cfg=model.get('train_cfg'), test_cfg=model.get('test_cfg')
            )
            if part == 'mask_head' and name == 'YOLACT':
                settings = dict(model[part])
            setattr(detector, part, MODELS.build(settings).eval())
    return detector


def features(head: Any) -> tuple[Tensor, ...]:
    """Random features of two images, as the head's neck returns them."""
    if isinstance(head, CenterNetHead):
        return (torch.randn(2, head.heatmap_head[0].in_channels, SIZE // 4, SIZE // 4),)
    if isinstance(head, SOLOHead):
        # It resizes the features of this pyramid itself.
        strides = [4, 8, 16, 32, 64]
    else:
        generator = getattr(head, 'prior_generator', None) or head.square_anchor_generator
        strides = [stride[0] if isinstance(stride, tuple) else stride for stride in generator.strides]
    channels = head.in_channels if isinstance(head.in_channels, (list, tuple)) else [head.in_channels] * len(strides)
    sides = [max(math.ceil(SIZE / stride), 1) for stride in strides]
    return tuple(torch.randn(2, count, side, side) for count, side in zip(channels, sides, strict=True))


def recorded(detector: Any) -> dict[str, list[Tensor]]:
    """Outputs of the modules that the loss reads, in train mode."""
    outputs = {}
    for tap in LocationPredictionLoss().taps(detector):
        name, _, child = tap.partition('.')
        head = getattr(detector, name)
        with torch.no_grad(), frozen_train_mode(head):
            if not child:
                outputs[tap] = flatten_tensors(head(features(head)))
            else:
                maps = features(detector.bbox_head)
                outputs[tap] = flatten_tensors(getattr(head, child)(maps[0] if child == 'protonet' else maps))
    return outputs


def decoded_by_mmdet(head: Any, maps: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and labels of the first image before NMS, as ``predict_by_feat`` computes them in eval mode."""
    captured = []

    def capture(results: Any, *args: Any, **kwargs: Any) -> Any:
        captured.append(results)
        return results

    cfg = head.test_cfg.copy()
    cfg.update(score_thr=0.0, nms_pre=10**6, conf_thr=0.0, min_bbox_size=-1)
    metas = [dict(img_shape=(FAR, FAR), scale_factor=(1.0, 1.0))] * 2
    method = '_bbox_mask_post_process' if isinstance(head, RTMDetInsHead) else '_bbox_post_process'
    with torch.no_grad(), patched(head, method, capture):
        head.predict_by_feat(*head(maps), batch_img_metas=metas, cfg=cfg, rescale=False)
    results = captured[0]
    return results.bboxes, results.scores * results.get('score_factors', torch.ones(())), results.labels


DECODED = (
    'RetinaNet', 'FCOS', 'ATSS', 'GFL', 'TOOD', 'VFNet', 'YOLOX', 'YOLOv3', 'YOLOF', 'RTMDet', 'RTMDet-Ins', 'SSD',
    'CenterNet2', 'FSAF', 'FoveaBox', 'RepPoints', 'FreeAnchor', 'AutoAssign', 'DDOD', 'NAS-FCOS',
)  # fmt: skip


@pytest.mark.parametrize('name', DECODED)
def test_scores_and_boxes_are_those_that_mmdetection_decodes(name: str) -> None:
    detector = build(name)
    head = detector.bbox_head
    maps = features(head)
    reader = location_reader(detector)
    with torch.no_grad():
        with frozen_train_mode(head):
            read = reader.read(head, {'bbox_head': flatten_tensors(head(maps))}, Constants())
        bboxes, scores, labels = decoded_by_mmdet(head, maps)
    logits = read.classes if read.factor is None else joint_logits(read.classes, read.factor)
    found = read.classes.softmax(-1)[0, :, :-1] if reader.softmax else logits[0].sigmoid()
    # Other boxes of a head with several sets are those before the last refinement.
    boxes = read.bboxes[-1][0].clamp(min=0)
    chosen = scores.argsort(descending=True)[:50]
    for bbox, score, label in zip(bboxes[chosen], scores[chosen], labels[chosen], strict=True):
        alike = (found[:, label] - score).abs() < 1e-5
        errors = (boxes - bbox.clamp(min=0)).abs().amax(-1)
        assert alike.any() and float(errors[alike].min()) < 1e-3 * max(1.0, float(bbox.abs().max()))


def test_centernet_boxes_are_those_of_its_heat_map() -> None:
    detector = build('CenterNet')
    head = detector.bbox_head
    with torch.no_grad():
        heat, size, offset = (kind[0] for kind in head(features(head)))
        size = size.abs()
        read = location_reader(detector).read(head, {'bbox_head': [heat, size, offset]}, Constants())
        detections, labels = head._decode_heatmap(heat, size, offset, heat.shape[2:], k=20)
    for detection, label in zip(detections[0], labels[0], strict=True):
        place = (read.classes[0, :, label].sigmoid() - detection[4]).abs().argmin()
        torch.testing.assert_close(read.bboxes[0][0, place], detection[:4], rtol=1e-4, atol=1e-4)


ALL_DENSE = tuple(FAMILIES)


@pytest.mark.parametrize('name', ALL_DENSE)
def test_loss_is_zero_at_equality_and_every_kind_of_map_gets_a_gradient(name: str) -> None:
    detector = build(name)
    teacher = recorded(detector)
    torch.manual_seed(1)
    student = {
        tap: [(m + 0.1 * m.std(correction=0) * torch.randn_like(m)).requires_grad_() for m in maps]
        for tap, maps in teacher.items()
    }
    loss = LocationPredictionLoss()
    same = loss(teacher, teacher, detector)
    value = loss(student, teacher, detector)
    value.backward()
    assert value.item() > 0.01 and abs(same.item()) < 1e-3 * value.item()
    reached = set()
    for maps in student.values():
        assert all(m.grad is not None and torch.isfinite(m.grad).all() for m in maps)
        reached |= {m.shape[1] for m in maps if m.grad.any()}
    # Not in all levels, because only the masks of the most confident locations are compared.
    levels = FAMILIES[name].name == 'SOLO'
    assert levels or reached == {m.shape[1] for maps in teacher.values() for m in maps}


@pytest.mark.parametrize('name', ['FCOS', 'TOOD', 'CondInst'])
def test_maps_in_16_bits_are_compared_in_32(name: str) -> None:
    detector = build(name)
    teacher = {tap: [m.bfloat16() for m in maps] for tap, maps in recorded(detector).items()}
    student = {tap: [m * 1.1 for m in maps] for tap, maps in teacher.items()}
    with torch.autocast('cpu', torch.bfloat16):
        low = LocationPredictionLoss()(student, teacher, detector)
    student, teacher = ({tap: [m.float() for m in maps] for tap, maps in kind.items()} for kind in (student, teacher))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, LocationPredictionLoss()(student, teacher, detector))


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    return reference_kl(Bernoulli(logits=teacher), Bernoulli(logits=student))


def test_terms_of_sigmoid_classes_with_a_factor() -> None:
    torch.manual_seed(0)
    student, teacher = (
        LocationOutputs(torch.randn(2, 5, 3), torch.randn(2, 5), regressions=(torch.randn(2, 5, 4),)) for _ in range(2)
    )
    joint = [o.classes.sigmoid() * o.factor.sigmoid()[..., None] for o in (student, teacher)]
    weight = joint[1].amax(-1)
    total = max(float(weight.sum()), 1.0)
    terms = location_terms(student, teacher)
    divergence = reference_kl(Bernoulli(joint[1]), Bernoulli(joint[0])).sum()
    torch.testing.assert_close(terms['classes'], divergence / total)
    scores = teacher.classes.sigmoid().amax(-1)
    torch.testing.assert_close(terms['factor'], (scores * kl(teacher.factor, student.factor)).sum() / total)
    values = teacher.regressions[0]
    share = weight / weight.sum()
    mean = (share[..., None] * values).sum((0, 1))
    spread = (share[..., None] * (values - mean) ** 2).sum((0, 1)).sqrt()
    error = nn.SmoothL1Loss(reduction='none')(student.regressions[0] / spread, values / spread).mean(-1)
    torch.testing.assert_close(terms['boxes'], (weight * error).sum() / total, rtol=1e-4, atol=1e-5)


def test_terms_of_softmax_classes_include_the_background() -> None:
    torch.manual_seed(0)
    student, teacher = (LocationOutputs(torch.randn(1, 6, 4)) for _ in range(2))
    total = float(teacher.classes.softmax(-1)[..., :3].amax(-1).sum())
    divergence = reference_kl(Categorical(logits=teacher.classes), Categorical(logits=student.classes)).sum()
    torch.testing.assert_close(location_terms(student, teacher, softmax=True)['classes'], divergence / max(total, 1.0))


@pytest.mark.parametrize('moved', [0, 1])
def test_boxes_are_weighted_by_the_confidence_and_compared_by_ciou(moved: int) -> None:
    logits = torch.tensor([[[2.0, -3.0], [-1.0, -2.0]]])
    box, shifted = torch.tensor([0.0, 0, 10, 10]), torch.tensor([5.0, 0, 15, 10])
    boxes = torch.stack([box, box])[None]
    student = boxes.clone()
    student[0, moved] = shifted
    terms = location_terms(LocationOutputs(logits, bboxes=(student,)), LocationOutputs(logits, bboxes=(boxes,)))
    weights = logits[0].amax(-1).sigmoid()
    ciou = 50 / 150 - 5**2 / (15**2 + 10**2)
    assert float(terms['boxes']) == pytest.approx(float(weights[moved] / weights.sum()) * (1 - ciou), rel=1e-4)
    assert float(terms['classes']) == pytest.approx(0, abs=1e-6)


def test_distributions_of_distances_are_compared() -> None:
    torch.manual_seed(0)
    logits, box = torch.tensor([[[3.0]]]), torch.tensor([[[0.0, 0, 10, 10]]])
    sides_S, sides_T = torch.randn(2, 1, 1, 4, 6).unbind(0)
    outputs = [LocationOutputs(logits, bboxes=(box,), sides=sides) for sides in (sides_S, sides_T)]
    expected = reference_kl(Categorical(logits=sides_T), Categorical(logits=sides_S)).mean() * logits.sigmoid().item()
    torch.testing.assert_close(location_terms(*outputs)['boxes'], expected)


def test_masks_of_the_most_confident_locations_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(module, 'MAX_MASKS', 2)
    classes = torch.tensor([[[-4.0], [2.0], [-1.0], [1.0]]])
    masks = torch.randn(2, 1, 4, 3, 3)
    outputs = [LocationOutputs(classes, masks=(MaskGroup(0, 4, lambda indices, m=m: m[:, indices[0]]),)) for m in masks]
    weights = classes[0, [1, 3], 0].sigmoid()
    divergences = kl(masks[1, 0, [1, 3]], masks[0, 0, [1, 3]]).mean((1, 2))
    expected = (weights * divergences).sum() / weights.sum()
    torch.testing.assert_close(location_terms(*outputs)['masks'], expected)


def test_joint_logits_are_those_of_the_product_and_stay_finite() -> None:
    classes, factor = torch.randn(50, 3) * 3, torch.randn(50) * 3
    product = classes.double().sigmoid() * factor.double().sigmoid()[:, None]
    torch.testing.assert_close(joint_logits(classes, factor).double(), product.logit(), rtol=1e-4, atol=1e-5)
    extreme = torch.tensor([-1e4, 0.0, 1e4])
    assert torch.isfinite(joint_logits(extreme[:, None].expand(3, 3).T, extreme)).all()


def test_masks_of_yolact_are_combinations_of_prototypes() -> None:
    coefficients, prototypes = torch.randn(2, 7, 4), torch.randn(2, 4, 3, 5)
    indices = torch.tensor([[1, 6], [0, 2]])
    masks = linear_masks(coefficients, prototypes).logits(indices)
    for image in range(2):
        for place, index in enumerate(indices[image]):
            weight = coefficients[image, index].view(1, 4, 1, 1)
            torch.testing.assert_close(
                masks[image, place], nn.functional.conv2d(prototypes[image : image + 1], weight)[0, 0]
            )


def test_masks_of_rtmdet_ins_are_those_that_it_predicts() -> None:
    detector = build('RTMDet-Ins')
    head, outputs = detector.bbox_head, recorded(detector)
    constants = Constants()
    read = location_reader(detector).read(head, outputs, constants)
    maps = outputs['bbox_head']
    priors = torch.cat(
        head.prior_generator.grid_priors([m.shape[2:] for m in maps[:3]], device='cpu', with_stride=True)
    )
    indices = torch.tensor([[0, 5, 300], [17, 1, 2]])
    masks = read.masks[0].logits(indices)
    kernels = rows(maps[6:9], maps[6].shape[1])
    for image, chosen in enumerate(indices):
        expected = head._mask_predict_by_feat_single(maps[9][image], kernels[image, chosen], priors[chosen])
        torch.testing.assert_close(masks[image], expected, rtol=1e-3, atol=1e-4)


def test_masks_of_condinst_are_those_that_it_predicts() -> None:
    detector = build('CondInst')
    head, mask_head, outputs = detector.bbox_head, detector.mask_head, recorded(detector)
    read = location_reader(detector).read(head, outputs, Constants())
    maps, (feature,) = outputs['bbox_head'], outputs['mask_head.mask_feature_head']
    priors = torch.cat(
        head.prior_generator.grid_priors([m.shape[2:] for m in maps[:5]], device='cpu', with_stride=True)
    )
    indices = torch.tensor([[0, 5, 300], [17, 1, 2]])
    masks = read.masks[0].logits(indices)
    kernels = rows(maps[15:20], maps[15].shape[1])
    size = feature.shape[2:]
    pixels = mask_head.prior_generator.single_level_grid_priors(size, 0, device='cpu')
    for image, chosen in enumerate(indices):
        points, strides = priors[chosen, :2], priors[chosen, 2]
        offsets = relative_coordinate_maps(pixels, points, strides, mask_head.size_of_interest, size)
        inputs = torch.cat([offsets, feature[image][None].repeat(3, 1, 1, 1)], 1).reshape(1, -1, *size)
        weights, biases = mask_head.parse_dynamic_params(kernels[image, chosen])
        expected = mask_head.dynamic_conv_forward(inputs, weights, biases, 3).reshape(3, *size)
        torch.testing.assert_close(masks[image], expected, rtol=1e-3, atol=1e-4)


def test_a_head_with_its_own_decoding_is_compared_without_it() -> None:
    detector = build('FCOS')
    head = detector.bbox_head
    assert location_reader(detector).lost == ''

    class Own(type(head)):  # type: ignore[misc]
        def _predict_by_feat_single(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    head.__class__ = Own
    reader = location_reader(detector)
    assert 'Own decodes them in an unknown way' in reader.lost
    read = reader.read(head, recorded(detector), Constants())
    assert read.bboxes == () and len(read.regressions) == 1 and read.factor is not None


def test_maps_of_another_layout_are_compared_raw_and_the_log_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(module, 'print_log', lambda line, logger: log.append(line))
    detector = build('RetinaNet')
    maps = {'bbox_head': [torch.randn(1, 7, 4, 4)]}
    loss = LocationPredictionLoss()
    assert float(loss(maps, maps, detector)) == pytest.approx(0, abs=1e-5)
    assert len(log) == 1 and 'RetinaHead' in log[0] and 'PredictionKLLoss' in log[0]
    loss(maps, maps, detector)
    assert len(log) == 1


def test_error_for_a_detector_without_such_a_head_names_an_alternative() -> None:
    with pytest.raises(UserError, match='mmzsq.PredictionLoss'):
        LocationPredictionLoss().taps(nn.Conv2d(1, 1, 1))


@pytest.mark.cuda
@pytest.mark.parametrize('name', ALL_DENSE)
def test_loss_does_not_wait_for_the_device(name: str) -> None:
    detector = build(name)
    for head in detector.children():
        head.cuda()
    teacher = {tap: [m.cuda() for m in maps] for tap, maps in recorded(build(name)).items()}
    student = {tap: [(1.1 * m).requires_grad_() for m in maps] for tap, maps in teacher.items()}
    loss = LocationPredictionLoss()
    loss(student, teacher, detector).backward()
    torch.cuda.set_sync_debug_mode('error')
    try:
        loss(student, teacher, detector).backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')
