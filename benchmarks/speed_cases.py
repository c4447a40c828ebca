# SPDX-License-Identifier: Apache-2.0
"""What is timed for docs/performance.md, in the order of its importance, and the goals that are set for it.

``speed.py`` measures the cases, ``tests/benchmarks`` holds them against the goals, ``performance_page.py`` writes both
down. The times beside a goal, of the paper's authors' code and of a prototype, were taken on one H100.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Goal:
    """The most that something measured may be.

    Attributes:
        key: Where a result has it, as ``'synthesis.ms_per_image_iteration'``.
        limit: The goal.
        authors: What the authors' code took; None where it was not measured.
        prototype: What a prototype took; None where there was none.
        naive: Whether the prototype had nothing done for its speed.
    """

    key: str
    limit: float
    authors: float | None = None
    prototype: float | None = None
    naive: bool = False

    def measured(self, result: Mapping[str, Any] | None) -> float | None:
        """What a result says, or None."""
        return lookup(result, self.key)


@dataclass(frozen=True)
class Case:
    """One call of ``benchmarks/benchmark.py``.

    Attributes:
        detector: What a table calls it.
        config: Path in the repository.
        what: What is measured.
        image_size: Side in pixels.
        batch_size: Images a step.
        seconds: About what it takes on an H100, its start included: with less time left it is not begun.
        repeats: Measurements of each kind.
        steps: That one measurement is of.
        options: ``--cfg-options``.
        goals: Set for it.
        general: Whether PyTorch's operators alone run, none that were written or rearranged for speed.
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
        """Of its file in ``benchmarks/results/benchmarks``, less ``.json``."""
        path = '_general' if self.general else ''
        return f'{self.detector.lower().replace(" ", "-")}_{self.image_size}_b{self.batch_size}{path}'

    @property
    def title(self) -> str:
        """What a table calls it."""
        path = ', general path' if self.general else ''
        return f'{self.detector}, {self.image_size} px, batch {self.batch_size}{path}'

    def arguments(self) -> list[str]:
        """The command line, less the name of the tool and ``--out``."""
        words = [self.config, '--what', *self.what, '--image-size', str(self.image_size)]
        words += ['--batch-size', str(self.batch_size), '--repeats', str(self.repeats), '--steps', str(self.steps)]
        words += ['--precision', 'bf16', *(['--general'] if self.general else [])]
        return [*words, *(['--cfg-options', *self.options] if self.options else [])]


def lookup(result: Mapping[str, Any] | None, key: str) -> Any:
    """Value of a nested mapping by its keys joined with dots; None where one is missing.

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
RELABELLING = ('synthesis', 'relabel')
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
"""What MMDetection's config of RTMDet-tiny says beside that of RTMDet-s."""

CASES = (
    Case(
        *YOLOV5_S,
        SYNTHESIS + TRAINING,
        640,
        32,
        60,
        goals=(Goal(STEP, 0.40, authors=7.90, prototype=0.556), *TRAINING_GOALS),
    ),
    # The goal is that of the batch that is best; the authors and the prototype took 64 images.
    Case(*YOLOV5_S, RELABELLING, 160, 256, 25, steps=20, goals=(Goal(STEP, 0.06, authors=1.77, prototype=0.094),)),
    Case(*YOLOV5_N, SYNTHESIS, 640, 64, 20, goals=(Goal(STEP, 0.25, prototype=0.345),)),
    Case(*YOLOX_S, SYNTHESIS, 640, 32, 45, goals=(Goal(STEP, 1.0, prototype=7.4, naive=True),)),
    Case(*MASK_RCNN_SWIN_T, SYNTHESIS, 640, 16, 60, goals=(Goal(STEP, 12.0, prototype=52.0, naive=True),)),
    Case(*YOLOV5_S, SYNTHESIS, 640, 32, 30, general=True),
    Case(*YOLOV5_S, TRAINING, 640, 16, 40, goals=TRAINING_GOALS),
    Case(*YOLOV5_N, TRAINING, 640, 32, 40, goals=TRAINING_GOALS),
    Case(*YOLOV5_N, TRAINING, 640, 16, 40, goals=TRAINING_GOALS),
    Case(*YOLOV5_S, RELABELLING, 160, 64, 20, steps=20),
    Case(*YOLOV5_S, RELABELLING, 160, 128, 20, steps=20),
    Case(*YOLO11_N, SYNTHESIS, 640, 32, 30),
    Case(*RTMDET_TINY, SYNTHESIS, 640, 32, 45, options=RTMDET_TINY_OPTIONS),
    Case(*MASK_RCNN_R50, SYNTHESIS, 640, 16, 45),
)
