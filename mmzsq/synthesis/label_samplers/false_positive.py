# SPDX-License-Identifier: Apache-2.0
"""False-positive sampling: unlabeled predictions of the teacher are added to the labels, and no label is removed.

DIODE (Chawla et al. 2021, https://research.nvidia.com/publication/2021-01_Data-Free-Knowledge-Distillation) extends one
object in each image to several in this way. The paper compares adaptive sampling with it (Figures 5 and 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmzsq.registry import LABEL_SAMPLERS
from mmzsq.synthesis.label_samplers.adaptive import AdaptiveLabelSampler


@LABEL_SAMPLERS.register_module()
class FalsePositiveSampler(AdaptiveLabelSampler):
    """Starts with the labels of another sampler and adds the teacher's false positives.

    False positives are the predictions that :class:`AdaptiveLabelSampler` adds, with the same thresholds. Comparing the
    two samplers therefore shows the effect of removing labels.

    Args:
        start: Config of the sampler that draws the initial labels.
        warmup: Optimization steps before the first correction.
        interval: Optimization steps between two corrections.
        score_thr: Predictions with lower or equal scores are ignored, in [0, 1].
        nms_iou: If two predictions of one class have a higher IoU, the one with the lower score is dropped.
        add_iou: A prediction is added if its IoU with every current box, of any class, is lower.
        area: A prediction is added only if its area, as a fraction of the image area, is strictly between these.

    Raises:
        UserError: If an argument is out of range, or ``start`` is itself adaptive.
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
        # No IoU is below 0, so no label is removed.
        super().__init__(start, warmup, interval, score_thr, nms_iou, add_iou, remove_iou=0.0, area=area)
