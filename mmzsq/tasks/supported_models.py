# SPDX-License-Identifier: Apache-2.0
"""Refuse models of MMDetection that are no detectors of fixed categories in single images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdet.models import detectors, mot, reid
from mmdet.registry import MODELS

from mmzsq.errors import UserError

REASONS: tuple[tuple[tuple[type, ...], str], ...] = (
    ((mot.BaseMOTModel,), 'it tracks objects in videos. Quantize its detector alone: use the config of that detector'),
    ((reid.BaseReID,), 'it compares crops of known objects and detects none'),
    (
        (detectors.GLIP, detectors.GroundingDINO),
        'its categories are texts that a language model reads at run time. Use a detector with fixed categories',
    ),
    (
        (detectors.TwoStagePanopticSegmentor,),
        'its loss needs a category for every pixel, and synthesis labels objects only. Use an instance segmentation '
        'model',
    ),
    (
        (detectors.SemiBaseDetector,),
        'it holds a teacher and a student of its own. Use the config of its detector and the weights of its teacher',
    ),
    ((detectors.FastRCNN,), 'it needs proposals from a file for every image. Use Faster R-CNN'),
    (
        (detectors.RPN,),
        'it proposes boxes without categories. Use a detector with a second stage, such as Faster R-CNN',
    ),
)
"""Unsupported classes, including their subclasses, and the reason."""


def check_supported(model: Mapping[str, Any]) -> None:
    """Check that a model is a detector that this package can quantize without images.

    Args:
        model: The ``model`` section of the detector's config. Types that are not registered are left to the registry.

    Raises:
        UserError: If it is of a kind that is known not to work. The message gives the reason.
    """
    cls = MODELS.get(model['type']) if isinstance(model.get('type'), str) else model.get('type')
    if not isinstance(cls, type):
        return
    for classes, reason in REASONS:
        if issubclass(cls, classes):
            raise UserError(f'{cls.__name__} is not supported: {reason}')
