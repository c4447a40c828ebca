# SPDX-License-Identifier: Apache-2.0
"""Timed cases of docs/performance.md in order of importance, with their goals.

``speed.py`` measures the cases, ``tests/benchmarks`` checks the goals, and ``performance_page.py`` writes both to the
page. The reference times of the authors' code and of a prototype were measured on one H100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """Upper limit of a measured value.

    Attributes:
        key: Dotted key of the value in a result, such as ``'synthesis.ms_per_image_iteration'``.
        limit: The goal.
        authors: Value of the authors' code; None if it was not measured.
        prototype: Value of the prototype; None if there was none.
        naive: Whether the prototype was not optimized.
    """

    key: str
    limit: float
    authors: float | None = None
    prototype: float | None = None
    naive: bool = False

    def measured(self, result: Mapping[str, Any] | None) -> float | None:
        """Return the value of a result, or None."""
        return lookup(result, self.key)


@dataclass(frozen=True)
class Case:
    """One call of ``benchmarks/benchmark.py``.

    Attributes:
        detector: Name in tables.
        config: Path in the repository.
        what: Kinds of steps to measure.
        image_size: Side in pixels.
        batch_size: Images per step.
        seconds: Approximate time on an H100, including start-up. The case is skipped if less time is left.
        repeats: Number of measurements of each kind.
        steps: Steps per measurement.
        options: ``--cfg-options``.
        goals: Goals of the case.
        general: Whether to use PyTorch operators only, without fused kernels and rearranged layers.
    """

    detector: str
    config: str
    what: tuple[str, ...]
    image_size: int
    batch_size: int
    seconds: int
    repeats: int = 10
    steps: int = 5
    options: tuple[str, ...] = ()
    goals: tuple[Goal, ...] = ()
    general: bool = False

    @property
    def name(self) -> str:
        """Stem of the file in ``benchmarks/results/benchmarks``."""
        path = '_general' if self.general else ''
        return f'{self.detector.lower().replace(" ", "-")}_{self.image_size}_b{self.batch_size}{path}'

    @property
    def title(self) -> str:
        """Title in tables."""
        path = ', general path' if self.general else ''
        return f'{self.detector}, {self.image_size} px, batch {self.batch_size}{path}'

    def arguments(self) -> list[str]:
        """Return the command line, without the name of the tool and ``--out``."""
        words = [self.config, '--what', *self.what, '--image-size', str(self.image_size)]
        words += ['--batch-size', str(self.batch_size), '--repeats', str(self.repeats), '--steps', str(self.steps)]
        words += ['--precision', 'bf16', *(['--general'] if self.general else [])]
        return [*words, *(['--cfg-options', *self.options] if self.options else [])]


def lookup(result: Mapping[str, Any] | None, key: str) -> Any:
    """Return the value of a nested mapping by its dotted key; None if a key is missing.

    Example:
        >>> lookup({'training': {'ratio': 1.5}}, 'training.ratio'), lookup(None, 'training.ratio')
        (1.5, None)
    """
    value: Any = result
    for part in key.split('.'):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


STEP = 'synthesis.ms_per_image_iteration'
SYNTHESIS = ('synthesis',)
RELABELING = ('synthesis', 'relabel')
TRAINING = ('training',)
YOLOV5_S = ('YOLOv5-s', 'configs/zsq/yolov5-s_w4a8.py')
YOLOV5_N = ('YOLOv5-n', 'configs/zsq/yolov5-n_w4a8.py')
YOLO11_N = ('YOLO11-n', 'configs/zsq/yolo11-n_w4a8.py')
YOLOX_S = ('YOLOX-s', 'configs/zsq/yolox-s_w4a8.py')
RTMDET_TINY = ('RTMDet-tiny', 'configs/zsq/rtmdet-s_w4a8.py')
MASK_RCNN_R50 = ('Mask R-CNN R50', 'configs/zsq/mask-rcnn_r50_w4a8.py')
MASK_RCNN_SWIN_T = ('Mask R-CNN Swin-T', 'configs/zsq/mask-rcnn_swin-t_w4a8.py')
TRAINING_GOALS = (Goal('training.ratio_quantized', 1.25), Goal('training.ratio_distilled', 1.8))
RTMDET_TINY_OPTIONS = (
    'model.backbone.deepen_factor=0.167',
    'model.backbone.widen_factor=0.375',
    'model.neck.in_channels=[96,192,384]',
    'model.neck.out_channels=96',
    'model.bbox_head.in_channels=96',
    'model.bbox_head.feat_channels=96',
)
"""Differences of MMDetection's config of RTMDet-tiny from that of RTMDet-s."""

CASES = (
    Case(
        *YOLOV5_S,
        SYNTHESIS + TRAINING,
        640,
        32,
        60,
        goals=(Goal(STEP, 0.40, authors=7.90, prototype=0.556), *TRAINING_GOALS),
    ),
    # The goal is for the fastest batch size; the authors' code and the prototype used 64 images.
    Case(*YOLOV5_S, RELABELING, 160, 256, 25, steps=20, goals=(Goal(STEP, 0.06, authors=1.77, prototype=0.094),)),
    Case(*YOLOV5_N, SYNTHESIS, 640, 64, 20, goals=(Goal(STEP, 0.25, prototype=0.345),)),
    Case(*YOLOX_S, SYNTHESIS, 640, 32, 45, goals=(Goal(STEP, 1.0, prototype=7.4, naive=True),)),
    Case(*MASK_RCNN_SWIN_T, SYNTHESIS, 640, 16, 60, goals=(Goal(STEP, 12.0, prototype=52.0, naive=True),)),
    Case(*YOLOV5_S, SYNTHESIS, 640, 32, 30, general=True),
    Case(*YOLOV5_S, TRAINING, 640, 16, 40, goals=TRAINING_GOALS),
    Case(*YOLOV5_N, TRAINING, 640, 32, 40, goals=TRAINING_GOALS),
    Case(*YOLOV5_N, TRAINING, 640, 16, 40, goals=TRAINING_GOALS),
    Case(*YOLOV5_S, RELABELING, 160, 64, 20, steps=20),
    Case(*YOLOV5_S, RELABELING, 160, 128, 20, steps=20),
    Case(*YOLO11_N, SYNTHESIS, 640, 32, 30),
    Case(*RTMDET_TINY, SYNTHESIS, 640, 32, 45, options=RTMDET_TINY_OPTIONS),
    Case(*MASK_RCNN_R50, SYNTHESIS, 640, 16, 45),
)
