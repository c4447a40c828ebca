# SPDX-License-Identifier: Apache-2.0
"""False-positive sampling: what the teacher sees and no label asked for joins the labels, and none ever leaves.

This is how DIODE (Chawla et al. 2021, https://research.nvidia.com/publication/2021-01_Data-Free-Knowledge-Distillation)
comes from one object an image to several; the paper compares adaptive sampling with it (Figures 5 and 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmzsq.registry import LABEL_SAMPLERS
from mmzsq.synthesis.label_samplers.adaptive import AdaptiveLabelSampler


@LABEL_SAMPLERS.register_module()
class FalsePositiveSampler(AdaptiveLabelSampler):
    """Starts from another sampler's labels and adds the teacher's false positives to them.

    What counts as one is what :class:`AdaptiveLabelSampler` adds, by the same thresholds: a comparison of the two shows
    what removing labels does.

    Args:
        start: Config of the sampler to start from.
        warmup: Steps of optimization before the first addition.
        interval: Steps between two additions.
        score_thr: Predictions count above this score, in [0, 1].
        nms_iou: Of two predictions of one class that overlap by more, the lower-scoring one is dropped.
        add_iou: Predictions are added that overlap every current box, of any class, by less.
        area: Only predictions of an area strictly between these shares of the image are added.

    Raises:
        UserError: If an argument is out of range, or ``start`` is adaptive itself.
    """

    def __init__(
        self,
        start: dict[str, Any] | None = None,
        warmup: int = 800,
        interval: int = 100,
        score_thr: float = 0.2,
        nms_iou: float = 0.6,
        add_iou: float = 0.35,
        area: Sequence[float] = (0.01, 0.85),
    ) -> None:
        # No overlap is below 0.
        super().__init__(start, warmup, interval, score_thr, nms_iou, add_iou, remove_iou=0.0, area=area)
