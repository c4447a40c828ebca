# SPDX-License-Identifier: Apache-2.0
"""Detection in single images by a checkpoint, float or quantized, or by an exported file."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.structures import InstanceData

from mmzsq.checkpoint import read_checkpoint
from mmzsq.class_names import check_same_classes, choose_classes
from mmzsq.config.compose import class_names, compose, detector_section
from mmzsq.errors import UserError
from mmzsq.image_detector import ImageDetector
from mmzsq.qat.student_checkpoint import load_student
from mmzsq.qat.teacher import load_teacher
from mmzsq.registry import MODELS
from mmzsq.tasks.detection_task import known_num_classes
from mmzsq.weights import is_quantized


@dataclass
class Predictor:
    """A loaded detector.

    Attributes:
        title: Name of its file.
        classes: Class names, None if neither file nor config has them.
        detector: Maps images to data samples.
    """

    title: str
    classes: Sequence[str] | None
    detector: Any

    def __call__(self, image: np.ndarray, score_thr: float) -> InstanceData:
        """Detect objects in one image.

        Args:
            image: (H, W, 3), uint8, in the order B, G, R.
            score_thr: Least score of a detection.

        Returns:
            ``bboxes`` (n, 4) xyxy in pixels of the image, ``scores``, ``labels`` and, if the detector predicts them,
            ``masks`` (n, H, W), on the CPU, the best first.
        """
        sample: DetDataSample = self.detector([image])[0]
        found: InstanceData = sample.pred_instances.cpu()
        found = found[found.scores >= score_thr]
        return found[found.scores.argsort(descending=True)]


def load_predictor(path: str, cfg: Config | None, runtime: str | None = None, threads: int = 0) -> Predictor:
    """Load a checkpoint or an exported file.

    Args:
        path: An exported ``.onnx``, or a checkpoint: a file, a URL or ``mmzsq://NAME``.
        cfg: Config of the detector, with a ``zsq`` section for a quantized checkpoint. An exported file of a dense
            detector with decoded boxes needs none.
        runtime: Engine of an exported file; by default that of its target.
        threads: Number of threads of an exported file; 0 lets the engine decide.

    Raises:
        UserError: If the config is missing or does not fit, or the file cannot be read.
    """
    register_all_modules()
    exported = Path(path).suffix == '.onnx'
    if cfg is not None and not ((cfg.get('test_dataloader') or {}).get('dataset')):
        raise UserError(f'config {cfg.filename} has no test_dataloader.dataset, whose pipeline reads the images')
    if exported:
        return _load_exported(path, cfg, runtime, threads)
    if cfg is None:
        raise UserError(f'the checkpoint {path} needs the config of its detector: add --config CONFIG')
    if is_quantized(read_checkpoint(path)):
        if 'zsq' not in cfg:
            raise UserError(
                f'{path} is a quantized checkpoint, but config {cfg.filename} has no zsq section: give the config that '
                'it was trained with'
            )
        model: Any = MODELS.build(compose(cfg).model)
        meta = load_student(model, path)
        detector = model.student
    else:
        detector = MMDET_MODELS.build(copy.deepcopy(detector_section(cfg)))
        meta = load_teacher(detector, path)
    classes = choose_classes(class_names(cfg), meta, known_num_classes(detector), path)
    return Predictor(_title(path), classes, ImageDetector(detector.to(get_device()).eval(), cfg))


def _load_exported(path: str, cfg: Config | None, runtime: str | None, threads: int) -> Predictor:
    # Deployment is an extra.
    from mmzsq.deploy import OnnxDetector, StandaloneDetector, read_metadata

    if cfg is None:
        alone = StandaloneDetector(path, runtime, threads)
        return Predictor(_title(path), alone.classes, alone)
    classes = json.loads(read_metadata(path)['classes'])
    parts = dict(model=detector_section(cfg), test_dataloader=cfg.test_dataloader)
    declared = class_names(cfg)
    check_same_classes(
        declared,
        classes,
        'the config',
        path,
        'Give the config that it was exported with, or no config of other classes',
    )
    return Predictor(_title(path), classes or declared, OnnxDetector(path, parts, runtime, threads))


def _title(path: str) -> str:
    return path.rstrip('/').rpartition('/')[2]
