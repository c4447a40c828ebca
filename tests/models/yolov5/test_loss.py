# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import complete_box_iou

from mmzsq.models.yolov5 import PaddedTargets, YOLOv5Head, pad_targets

CLASSES = 4
SIZE = (96, 160)  # height, width in pixels


def random_maps(images: int = 3, scale: float = 1.0) -> list[Tensor]:
    return [
        (torch.randn(images, 3 * (5 + CLASSES), SIZE[0] // s, SIZE[1] // s) * scale).requires_grad_()
        for s in (8, 16, 32)
    ]


def random_instances(*counts: int) -> list[InstanceData]:
    instances = []
    for count in counts:
        center = torch.rand(count, 2) * torch.tensor([SIZE[1], SIZE[0]])
        half = torch.rand(count, 2) * 40 + 2
        bboxes = torch.cat((center - half, center + half), dim=1)
        instances.append(InstanceData(bboxes=bboxes, labels=torch.randint(CLASSES, (count,))))
    return instances


def reference_loss(
    maps: list[Tensor], instances: list[InstanceData], anchors: list, strides: tuple[int, ...]
) -> dict[str, Tensor]:
    """Compute YOLOv5's loss in loops over images, targets, anchors and cells, in units of cells."""
    box_loss = cls_loss = obj_loss = torch.zeros(())
    for level, level_anchors, stride, balance in zip(maps, anchors, strides, (4, 1, 0.4), strict=True):
        images, _, rows, columns = level.shape
        outputs = level.view(images, 3, 5 + CLASSES, rows, columns)
        objectness = torch.zeros(images, 3, rows, columns)
        box_terms, cls_terms = [], []
        for image, targets in enumerate(instances):
            for bbox, label in zip(targets.bboxes / stride, targets.labels, strict=True):
                x1, y1, x2, y2 = bbox.tolist()
                gx, gy, gw, gh = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
                cells = [(int(gx), int(gy))]
                if gx % 1 < 0.5 and gx > 1:
                    cells.append((int(gx) - 1, int(gy)))
                if gy % 1 < 0.5 and gy > 1:
                    cells.append((int(gx), int(gy) - 1))
                if gx % 1 > 0.5 and gx < columns - 1:
                    cells.append((int(gx) + 1, int(gy)))
                if gy % 1 > 0.5 and gy < rows - 1:
                    cells.append((int(gx), int(gy) + 1))
                for index, (aw, ah) in enumerate(level_anchors):
                    aw, ah = aw / stride, ah / stride
                    if max(gw / aw, aw / gw, gh / ah, ah / gh) >= 4:
                        continue
                    for cx, cy in cells:
                        p = outputs[image, index, :, cy, cx]
                        x, y = p[:2].sigmoid() * 2 - 0.5 + torch.tensor([cx, cy])
                        w, h = (p[2:4].sigmoid() * 2) ** 2 * torch.tensor([aw, ah])
                        box = torch.stack((x - w / 2, y - h / 2, x + w / 2, y + h / 2))
                        iou = complete_box_iou(box[None], bbox[None])[0, 0]
                        box_terms.append(1 - iou)
                        one_hot = F.one_hot(label, CLASSES).float()
                        cls_terms.append(F.binary_cross_entropy_with_logits(p[5:], one_hot))
                        best = max(objectness[image, index, cy, cx].item(), iou.item())
                        objectness[image, index, cy, cx] = best
        if box_terms:
            box_loss = box_loss + torch.stack(box_terms).mean()
            cls_loss = cls_loss + torch.stack(cls_terms).mean()
        bce = F.binary_cross_entropy_with_logits(outputs[:, :, 4], objectness)
        obj_loss = obj_loss + balance * bce
    return dict(
        loss_cls=cls_loss * 0.5 * CLASSES / 80,
        loss_bbox=box_loss * 0.05,
        loss_obj=obj_loss * SIZE[0] * SIZE[1] / 640**2,
    )


@pytest.fixture
def head() -> YOLOv5Head:
    return YOLOv5Head(CLASSES, widen_factor=0.125)


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('counts', [(3, 1, 8), (0, 2, 0), (0, 0, 0), (40, 40, 40)])
def test_values_and_gradients_equal_a_plain_loop(head: YOLOv5Head, plain, counts, layout) -> None:
    maps = [m.detach().contiguous(memory_format=layout).requires_grad_() for m in random_maps()]
    instances = random_instances(*counts)
    result = head.loss_by_targets(maps, pad_targets(instances))
    expected = reference_loss(maps, instances, plain.anchors, plain.strides)
    assert result.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(result[name], expected[name], rtol=1e-4, atol=1e-6)
    grads = torch.autograd.grad(sum(result.values()), maps)
    expected_grads = torch.autograd.grad(sum(expected.values()), maps)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-7)
    # The gradient keeps the memory layout of the maps.
    assert all(grad.is_contiguous(memory_format=layout) for grad in grads)


def test_length_of_the_padding_and_order_of_the_targets_do_not_matter(head: YOLOv5Head) -> None:
    maps, instances = random_maps(), random_instances(12, 5, 0)
    shuffled = [image[torch.randperm(len(image))] for image in instances]
    expected = head.loss_by_targets(maps, pad_targets(instances))
    for result in (
        head.loss_by_targets(maps, pad_targets(instances, length=30)),
        head.loss_by_targets(maps, pad_targets(shuffled)),
    ):
        for name in expected:
            torch.testing.assert_close(result[name], expected[name])


def test_a_batch_twice_as_large_has_the_same_loss(head: YOLOv5Head) -> None:
    maps, instances = random_maps(), random_instances(2, 3, 4)
    once = head.loss_by_targets(maps, pad_targets(instances))
    twice = head.loss_by_targets([torch.cat((m, m)) for m in maps], pad_targets(instances * 2))
    for name in once:
        torch.testing.assert_close(once[name], twice[name])


def test_a_perfect_prediction_has_no_box_loss_and_a_finite_gradient(head: YOLOv5Head) -> None:
    # Logits of zero decode to a box of the anchor's size at the center of its cell.
    bbox = torch.tensor([[84 - 8.0, 44 - 15.0, 84 + 8.0, 44 + 15.0]])
    maps = [torch.zeros_like(m, requires_grad=True) for m in random_maps(1)]
    targets = pad_targets([InstanceData(bboxes=bbox, labels=torch.tensor([0]))])
    bboxes, _, _ = head.dense_predictions(maps)
    assert (bboxes[0] - bbox).abs().amax(-1).min() == 0
    losses = head.loss_by_targets(maps, targets)
    sum(losses.values()).backward()
    assert all(m.grad.isfinite().all() for m in maps)


def test_padding_may_hold_anything(head: YOLOv5Head) -> None:
    maps = random_maps()
    targets = pad_targets(random_instances(2, 1, 0), length=4)
    noise = torch.where(targets.valid[..., None], targets.bboxes, torch.full_like(targets.bboxes, 1e4))
    expected = head.loss_by_targets(maps, targets)
    result = head.loss_by_targets(maps, PaddedTargets(noise, targets.labels, targets.valid))
    for name in expected:
        torch.testing.assert_close(result[name], expected[name])


def test_low_precision_maps_give_a_loss_in_float32(head: YOLOv5Head) -> None:
    maps, targets = random_maps(), pad_targets(random_instances(2, 3, 4))
    result = head.loss_by_targets([m.bfloat16() for m in maps], targets)
    expected = head.loss_by_targets(maps, targets)
    for name in expected:
        assert result[name].dtype == torch.float32
        torch.testing.assert_close(result[name], expected[name], rtol=0.02, atol=1e-4)


def test_the_head_takes_data_samples_and_runs_forward_once(head: YOLOv5Head) -> None:
    seen = []
    head.register_forward_hook(lambda _, __, output: seen.append(output))
    feats = [torch.randn(1, c, SIZE[0] // s, SIZE[1] // s) for c, s in ((32, 8), (64, 16), (128, 32))]
    sample = DetDataSample(metainfo=dict(img_shape=SIZE))
    (sample.gt_instances,) = random_instances(3)
    losses = head.loss(feats, [sample])
    assert len(seen) == 1
    (maps,) = seen[0]
    expected = head.loss_by_targets(maps, pad_targets([sample.gt_instances]))
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name])
        assert losses[name].shape == ()


def test_fresh_biases_expect_few_objects() -> None:
    head = YOLOv5Head(CLASSES, widen_factor=0.125)
    head.init_weights()
    for conv, stride in zip(head.convs, (8, 16, 32), strict=True):
        bias = conv.bias.detach().view(3, -1)
        objects = bias[:, 4].exp() * (640 / stride) ** 2
        torch.testing.assert_close(objects, torch.full((3,), 8.0))
        assert bias[0, 5].item() == pytest.approx(math.log(0.6 / (CLASSES - 0.99999)))


@pytest.mark.cuda
def test_on_a_gpu_nothing_waits_for_it() -> None:
    head = YOLOv5Head(CLASSES, widen_factor=0.125).cuda()
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
    head = YOLOv5Head(CLASSES, widen_factor=0.125).cuda()
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
