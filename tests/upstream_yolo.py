# SPDX-License-Identifier: Apache-2.0
"""Random weights, targets and raw outputs of Ultralytics' own models, to compare with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

SIZE = (64, 96)  # height, width in pixels
CLASSES = 5
PLACES = [SIZE[0] // stride * (SIZE[1] // stride) for stride in (8, 16, 32)]


def upstream_model(name: str) -> nn.Module:
    """Build a model of the package ``ultralytics`` with random weights.

    Args:
        name: Name of its config without the suffix, such as ``yolo11n``.
    """
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    upstream = DetectionModel(f'{name}.yaml', nc=CLASSES, verbose=False)
    upstream.args = SimpleNamespace(box=7.5, cls=0.5, dfl=1.5, epochs=100)
    with torch.no_grad():
        randomize(upstream)
    return upstream


def randomize(model: nn.Module) -> None:
    """Set BatchNorm layers to random parameters and statistics that give raw outputs a deviation of about 1."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.1)
        norm.momentum = None
        norm.reset_running_stats()
    model.train()(torch.rand(8, 3, *SIZE))
    model.eval()
    for norm in norms:
        norm.running_mean += 0.05 * torch.randn_like(norm.running_mean) * norm.running_var.sqrt()
        norm.running_var *= 0.8 + 0.4 * torch.rand_like(norm.running_var)
    head = model.model[-1]
    branches = [(head.cv2, head.cv3)]
    if hasattr(head, 'one2one_cv2'):
        branches = [(head.one2one_cv2, head.one2one_cv3)]
    last = [(box[-1], cls[-1]) for boxes, classes in branches for box, cls in zip(boxes, classes, strict=True)]
    for layer in (layer for layers in last for layer in layers):
        layer.bias.normal_()
    maps = raw_outputs(model(torch.rand(2, 3, *SIZE))).split(PLACES, dim=2)
    for layers, scale_map in zip(last, maps, strict=True):
        for layer, outputs in zip(layers, scale_map.split((scale_map.shape[1] - CLASSES, CLASSES), dim=1), strict=True):
            layer.weight /= outputs.std(dim=2).mean()
    if head.reg_max == 1:
        # Boxes of about five cells around each location, and scores that are neither 0 nor 1.
        maps = raw_outputs(model(torch.rand(2, 3, *SIZE))).split(PLACES, dim=2)
        for (box, cls), scale_map in zip(last, maps, strict=True):
            means = scale_map.mean(dim=(0, 2))
            box.bias += 2.5 - means[:4]
            cls.bias -= means[4:]


def raw_outputs(outputs: Any) -> Tensor:
    """Extract the raw outputs from the return value of Ultralytics' forward in eval mode, for any version.

    Those of YOLO26 are of the branch with one location per object.
    """
    raw = outputs[1]
    if isinstance(raw, dict):
        raw = raw.get('one2one', raw)
        return torch.cat((raw['boxes'], raw['scores']), 1)
    return torch.cat([scale_map.flatten(2) for scale_map in raw], 2)


def instances(smallest: float) -> list[InstanceData]:
    """Draw targets inside two images, with sides of at least ``smallest`` pixels."""
    result = []
    for count in (3, 6):
        size = torch.tensor([SIZE[1], SIZE[0]], dtype=torch.float32)
        sides = smallest + torch.rand(count, 2) * (size - smallest)
        low = torch.rand(count, 2) * (size - sides)
        labels = torch.randint(CLASSES, (count,))
        result.append(InstanceData(bboxes=torch.cat((low, low + sides), 1), labels=labels))
    return result


def upstream_batch(wanted: list[InstanceData]) -> dict[str, Tensor]:
    """Convert targets to the format of Ultralytics' loss: centers and sides relative to the image size."""
    bboxes = torch.cat([image.bboxes for image in wanted])
    shares = torch.cat(((bboxes[:, :2] + bboxes[:, 2:]) / 2, bboxes[:, 2:] - bboxes[:, :2]), 1)
    return dict(
        batch_idx=torch.cat([torch.full((len(image),), float(index)) for index, image in enumerate(wanted)]),
        cls=torch.cat([image.labels for image in wanted]).float()[:, None],
        bboxes=shares / torch.tensor([SIZE[1], SIZE[0], SIZE[1], SIZE[0]]),
    )
