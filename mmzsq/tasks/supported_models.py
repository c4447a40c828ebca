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
        'it holds a teacher and a student of its own. Take the detector inside: use the config that its model.detector '
        'comes from, and save the weights under `student.` or `teacher.` of its checkpoint alone',
    ),
    (
        (detectors.LAD,),
        'it holds the teacher of its own training, model.teacher_ckpt. Use type PAA, bbox_head.type PAAHead and no '
        'teacher_* keys in its model, and save its checkpoint without the weights under teacher_model',
    ),
    (
        (detectors.KnowledgeDistillationSingleStageDetector,),
        'it holds the teacher of its own training, model.teacher_config. Use the config of its student, such as GFL '
        'for LD',
    ),
    ((detectors.FastRCNN,), 'it needs proposals from a file for every image. Use Faster R-CNN'),
    (
        (detectors.RPN,),
        'it proposes boxes without categories. Use a detector with a second stage, such as Faster R-CNN',
    ),
)
"""Unsupported classes, including their subclasses, and the reason."""

COLOR_CHANNELS = 3


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
    if issubclass(cls, detectors.MaskFormer):
        _check_instances_only(cls.__name__, model)
    _check_input_channels(cls.__name__, model)


def _check_instances_only(name: str, model: Mapping[str, Any]) -> None:
    """Check that MaskFormer or Mask2Former segments instances.

    Raises:
        UserError: If it also has "stuff" categories, or predicts no instances.
    """
    head, test_cfg = (model.get(key) or {} for key in ('panoptic_head', 'test_cfg'))
    if head.get('num_stuff_classes', 53):
        raise UserError(
            f'{name} with "stuff" categories (panoptic_head.num_stuff_classes) is not supported: its loss needs a '
            'category for every pixel, and synthesis labels objects only. Use a config for instance segmentation'
        )
    if not test_cfg.get('instance_on', False):
        raise UserError(
            f'{name} is not supported with test_cfg.instance_on=False: it predicts no instances. Set '
            'model.test_cfg.instance_on=True'
        )


def _check_input_channels(name: str, model: Mapping[str, Any]) -> None:
    """Check that a detector reads color images, if its config gives the number of channels.

    Raises:
        UserError: If it does not.
    """
    backbone, preprocessor = (model.get(key) or {} for key in ('backbone', 'data_preprocessor'))
    counts = {'backbone.in_channels': backbone.get('in_channels')}
    mean = preprocessor.get('mean')
    # A single value normalizes the three channels of a color image alike.
    if isinstance(mean, (list, tuple)) and len(mean) > 1:
        counts['data_preprocessor.mean'] = len(mean)
    for key, count in counts.items():
        if isinstance(count, int) and count != COLOR_CHANNELS:
            raise UserError(
                f'{name} is not supported with images of {count} channel{"s" * (count > 1)} (model.{key}): synthesis '
                'makes color images. Use a detector of images with 3 channels'
            )
