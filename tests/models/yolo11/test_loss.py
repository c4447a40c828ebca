# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Sequence

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import complete_box_iou

from mmzsq.models.padded_targets import PaddedTargets, pad_targets
from mmzsq.models.yolo11 import YOLO11Head

CLASSES = 4
SIZE = (64, 96)  # height, width in pixels
STRIDES = (8, 16, 32)


def random_maps(images: int = 3) -> list[Tensor]:
    return [torch.randn(images, 64 + CLASSES, SIZE[0] // s, SIZE[1] // s).requires_grad_() for s in STRIDES]


def random_instances(*counts: int) -> list[InstanceData]:
    instances = []
    for count in counts:
        center = torch.rand(count, 2) * torch.tensor([SIZE[1], SIZE[0]])
        half = torch.rand(count, 2) * 30 + 2
        bboxes = torch.cat((center - half, center + half), dim=1)
        instances.append(InstanceData(bboxes=bboxes, labels=torch.randint(CLASSES, (count,))))
    return instances


def reference_assignment(
    bboxes: Tensor, scores: Tensor, locations: Sequence[tuple[float, float]], gt: InstanceData
) -> dict[int, tuple[int, float]]:
    """Return target and score of each assigned location of one image, in a plain loop over pairs."""
    overlap: dict[tuple[int, int], float] = {}
    alignment: dict[tuple[int, int], float] = {}
    chosen: dict[int, list[int]] = {}
    for index, (bbox, label) in enumerate(zip(gt.bboxes, gt.labels, strict=True)):
        x1, y1, x2, y2 = bbox.tolist()
        for location, (x, y) in enumerate(locations):
            if x1 < x < x2 and y1 < y < y2:
                iou = complete_box_iou(bboxes[location][None], bbox[None])[0, 0].item()
                overlap[index, location] = max(iou, 0.0)
                alignment[index, location] = scores[location, label].item() ** 0.5 * overlap[index, location] ** 6
        mine = sorted((value, location) for (i, location), value in alignment.items() if i == index and value > 0)
        for _, location in mine[-10:]:
            chosen.setdefault(location, []).append(index)
    assigned = {}
    for location, rivals in chosen.items():
        if len(rivals) > 1:
            rivals = [max((i for i in range(len(gt)) if (i, location) in overlap), key=lambda i: overlap[i, location])]
        assigned[location] = rivals[0]
    result = {}
    for location, index in assigned.items():
        same = [other for other, target in assigned.items() if target == index]
        best = max(alignment[index, other] for other in same)
        widest = max(overlap[index, other] for other in same)
        result[location] = index, alignment[index, location] * widest / (best + 1e-9)
    return result


def reference_loss(maps: list[Tensor], instances: list[InstanceData], plain: type) -> dict[str, Tensor]:
    """Compute YOLO11's loss in loops over images and locations."""
    bboxes, scores = plain.decode(maps)
    locations = [
        ((column + 0.5) * stride, (row + 0.5) * stride)
        for stride in STRIDES
        for row in range(SIZE[0] // stride)
        for column in range(SIZE[1] // stride)
    ]
    strides = [s for s in STRIDES for _ in range(SIZE[0] // s * (SIZE[1] // s))]
    logits = torch.cat([m.flatten(2) for m in maps], 2)
    wanted = torch.zeros_like(scores)
    box_loss = dfl_loss = torch.zeros(())
    for image, gt in enumerate(instances):
        assigned = reference_assignment(bboxes[image].detach(), scores[image].detach(), locations, gt)
        for location, (index, score) in assigned.items():
            bbox, stride = gt.bboxes[index], strides[location]
            wanted[image, location, gt.labels[index]] = score
            box_loss = box_loss + score * (1 - complete_box_iou(bboxes[image, location][None], bbox[None])[0, 0])
            x, y = locations[location]
            sides = x - bbox[0], y - bbox[1], bbox[2] - x, bbox[3] - y
            for side, distance in enumerate(sides):
                cells = min(max(distance.item() / stride, 0), 15 - 0.01)
                log_p = logits[image, 16 * side : 16 * side + 16, location].log_softmax(0)
                low = math.floor(cells)
                error = -(low + 1 - cells) * log_p[low] - (cells - low) * log_p[low + 1]
                dfl_loss = dfl_loss + score * error / 4
    total = max(wanted.sum().item(), 1)
    cls_loss = F.binary_cross_entropy_with_logits(logits[:, 64:].transpose(1, 2), wanted.detach(), reduction='sum')
    return dict(
        loss_cls=cls_loss * 0.5 / total,
        loss_bbox=box_loss * 7.5 / total,
        loss_dfl=dfl_loss * 1.5 / total,
    )


@pytest.fixture
def head() -> YOLO11Head:
    return YOLO11Head(CLASSES, widen_factor=0.125)


@pytest.mark.parametrize('counts', [(3, 1, 8), (0, 2, 0), (0, 0, 0), (20, 0, 20)])
def test_values_and_gradients_equal_a_plain_loop(head: YOLO11Head, plain, counts) -> None:
    maps, instances = random_maps(), random_instances(*counts)
    result = head.loss_by_targets(maps, pad_targets(instances))
    expected = reference_loss(maps, instances, plain)
    assert result.keys() == expected.keys()
    assert sum(counts) == 0 or min(result.values()) > 0
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-6)
    grads = torch.autograd.grad(sum(result.values()), maps)
    expected_grads = torch.autograd.grad(sum(expected.values()), maps)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-6)


def test_length_of_the_padding_and_order_of_the_targets_do_not_matter(head: YOLO11Head) -> None:
    maps, instances = random_maps(), random_instances(12, 5, 0)
    shuffled = [image[torch.randperm(len(image))] for image in instances]
    expected = head.loss_by_targets(maps, pad_targets(instances))
    for result in (
        head.loss_by_targets(maps, pad_targets(instances, length=30)),
        head.loss_by_targets(maps, pad_targets(shuffled)),
    ):
        for name in expected:
            torch.testing.assert_close(result[name], expected[name])


def test_a_batch_twice_as_large_has_the_same_loss(head: YOLO11Head) -> None:
    maps, instances = random_maps(), random_instances(9, 6, 8)
    once = head.loss_by_targets(maps, pad_targets(instances))
    twice = head.loss_by_targets([torch.cat((m, m)) for m in maps], pad_targets(instances * 2))
    for name in once:
        torch.testing.assert_close(once[name], twice[name])


def test_padding_may_hold_anything(head: YOLO11Head) -> None:
    maps = random_maps()
    targets = pad_targets(random_instances(2, 1, 0), length=4)
    noise = torch.where(targets.valid[..., None], targets.bboxes, torch.full_like(targets.bboxes, 1e4))
    expected = head.loss_by_targets(maps, targets)
    result = head.loss_by_targets(maps, PaddedTargets(noise, targets.labels, targets.valid))
    for name in expected:
        torch.testing.assert_close(result[name], expected[name])


def test_a_perfect_prediction_has_no_box_loss_and_a_finite_gradient(head: YOLO11Head) -> None:
    maps = [m.detach() * 0 for m in random_maps(1)]
    # Two cells to each side of the center (84, 44), with a probability near 1.
    maps[0][0, [2, 18, 34, 50], 5, 10] = 100.0
    maps = [m.requires_grad_() for m in maps]
    targets = pad_targets([InstanceData(bboxes=torch.tensor([[68.0, 28, 100, 60]]), labels=torch.tensor([0]))])
    losses = head.loss_by_targets(maps, targets)
    sum(losses.values()).backward()
    assert all(m.grad.isfinite().all() for m in maps)
    bboxes, _, _ = head.dense_predictions(maps)
    assert (bboxes[0] - targets.bboxes[0]).abs().amax(-1).min() < 1e-4
    maps[0].data[0, [2, 18, 34, 50], 5, 10] = 0.0
    worse = head.loss_by_targets(maps, targets)
    assert losses['loss_dfl'] < worse['loss_dfl'] and losses['loss_bbox'] < worse['loss_bbox']


def test_targets_out_of_range_are_clamped_below_the_largest_distance() -> None:
    head = YOLO11Head(CLASSES, in_channels=(256,), strides=(8,))
    scale_map = torch.zeros(1, 64 + CLASSES, 1, 1)
    scale_map[:, 15:64:16] = 40.0  # 15 cells (120 px) with a probability near 1
    targets = pad_targets([InstanceData(bboxes=torch.tensor([[-196.0, -196, 204, 204]]), labels=torch.tensor([0]))])
    losses = head.loss_by_targets([scale_map], targets)
    # The target score of the only location is the IoU of squares of 240 and 400 px. A target distance of 14.99 cells
    # has a weight of 0.01 at 14.
    score = (240 / 400) ** 2
    assert losses['loss_dfl'].item() == pytest.approx(1.5 * score * 0.01 * 40, rel=1e-3)
    assert losses['loss_bbox'].item() == pytest.approx(7.5 * score * (1 - score), rel=1e-3)


def test_low_precision_maps_give_a_loss_in_float32(head: YOLO11Head) -> None:
    maps, targets = random_maps(), pad_targets(random_instances(2, 3, 4))
    rounded = [m.bfloat16() for m in maps]
    with torch.autocast('cpu', torch.bfloat16):
        result = head.loss_by_targets(rounded, targets)
    expected = head.loss_by_targets([m.float() for m in rounded], targets)
    for name in expected:
        assert result[name].dtype == torch.float32
        torch.testing.assert_close(result[name], expected[name])


def test_the_head_takes_data_samples_and_runs_forward_once(head: YOLO11Head) -> None:
    seen = []
    head.register_forward_hook(lambda _, __, output: seen.append(output))
    feats = [torch.randn(1, c, SIZE[0] // s, SIZE[1] // s) for c, s in ((32, 8), (64, 16), (64, 32))]
    sample = DetDataSample(metainfo=dict(img_shape=SIZE))
    (sample.gt_instances,) = random_instances(3)
    losses = head.loss(feats, [sample])
    assert len(seen) == 1
    (maps,) = seen[0]
    expected = head.loss_by_targets(maps, pad_targets([sample.gt_instances]))
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name])
        assert losses[name].shape == ()
    # Labels may also be tensors.
    padded = head.loss(feats, pad_targets([sample.gt_instances], 16))
    for name in expected:
        torch.testing.assert_close(padded[name], expected[name])


def test_fresh_biases_expect_few_objects(head: YOLO11Head) -> None:
    head.init_weights()
    for box_convs, cls_convs, stride in zip(head.box_convs, head.cls_convs, STRIDES, strict=True):
        assert (box_convs[2].bias == 1).all()
        objects = cls_convs[2].bias.detach().exp().sum() * (640 / stride) ** 2
        torch.testing.assert_close(objects, torch.tensor(5.0))


@pytest.mark.cuda
def test_on_a_gpu_nothing_waits_for_it() -> None:
    head = YOLO11Head(CLASSES, widen_factor=0.125).cuda()
    maps = [m.detach().cuda().requires_grad_() for m in random_maps()]
    instances = [image.to('cuda') for image in random_instances(3, 0, 7)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        sum(head.loss_by_feat(maps, instances, []).values()).backward()
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.cuda
def test_on_a_gpu_a_captured_step_gives_the_same_bits() -> None:
    head = YOLO11Head(CLASSES, widen_factor=0.125).cuda()
    maps = [m.detach().cuda().requires_grad_() for m in random_maps()]
    targets = pad_targets([image.to('cuda') for image in random_instances(30, 0, 30)], length=32)

    def step() -> list[Tensor]:
        loss = sum(head.loss_by_targets(maps, targets).values())
        return [loss, *torch.autograd.grad(loss, maps)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    for _ in range(3):
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))
