# SPDX-License-Identifier: Apache-2.0
"""Quantized detectors for the tests of deployment."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from torch import nn

from mmzsq.datasets.shapes_drawing import draw_scene
from mmzsq.quantization import QuantizationConfig, calibrating, equalize, prepare


def random_batch_norms(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight.normal_(1.0, 0.5)
                module.running_mean.normal_(0.0, 0.1)
                module.running_var.uniform_(0.5, 2.0)


def quantize_detector(detector: Any, run: Callable[[], Any], bits: int, **config: Any) -> Any:
    cfg = QuantizationConfig.from_dict(dict(w_bits=bits, a_bits=bits, first_bits='same', last_bits='same', **config))
    # Grids on values between layers are placed where a run needs them.
    prepare(detector.eval(), cfg, run=run if cfg.outputs or cfg.target else None)
    with torch.no_grad():
        if cfg.equalize:
            equalize(detector, run)
        with calibrating(detector):
            run()
    return detector


def scenes() -> torch.Tensor:
    """Two drawn scenes (2, 3, 128, 128), normalized."""
    scenes = [torch.from_numpy(np.ascontiguousarray(draw_scene(0, index, 128).image)) for index in range(2)]
    return torch.stack(scenes).permute(0, 3, 1, 2)[:, [2, 1, 0]].float() / 255


def shipped_detector(repo: Path, bits: int, **config: Any) -> tuple[Any, Any, torch.Tensor]:
    from mmdet.utils import register_all_modules
    from safetensors.torch import load_file

    register_all_modules()
    cfg = Config.fromfile(repo / 'configs/shapes/yolov5-p_shapes.py')
    detector = MODELS.build(cfg.model)
    detector.load_state_dict(load_file(repo / 'mmzsq/assets/yolov5-p_shapes.safetensors'))
    images = scenes()
    return quantize_detector(detector, lambda: detector(images), bits, **config), cfg, images


def random_detector(cfg: Any, size: int, run: Callable[[Any, torch.Tensor], Any], **settings: Any) -> Any:
    """Build a detector with random weights and BatchNorms, and quantize it to 8 bits, with more settings if given."""
    detector: Any = MODELS.build(cfg).eval()
    random_batch_norms(detector)
    images = torch.randn(1, 3, size, size)
    return quantize_detector(detector, lambda: run(detector, images), 8, **settings)


def run_both_stages(detector: Any, images: torch.Tensor) -> Any:
    features = detector.extract_feat(images)
    return detector.rpn_head(features), [part(features) for part in _heads_of(detector)]


def _heads_of(detector: Any) -> list[Callable[[Any], Any]]:
    rois = torch.tensor([[0.0, 0.0, 0.0, 50.0, 50.0], [0.0, 10.0, 5.0, 64.0, 30.0]])
    roi_head = detector.roi_head
    stages = [()] if not hasattr(roi_head, 'num_stages') else [(stage,) for stage in range(roi_head.num_stages)]
    calls: list[Callable[[Any], Any]] = [lambda x, s=s: roi_head._bbox_forward(*s, x, rois) for s in stages]
    if roi_head.with_mask:
        calls.append(lambda x: roi_head._mask_forward(x, rois))
    return calls
