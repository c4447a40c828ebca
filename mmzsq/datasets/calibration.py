# SPDX-License-Identifier: Apache-2.0
"""A calibration set as a data set of MMDetection."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmdet.datasets import CocoDataset

from mmzsq.errors import UserError
from mmzsq.registry import DATASETS
from mmzsq.synthesis.calibration_set import CalibrationSet


@DATASETS.register_module()
class CalibrationDataset(CocoDataset):
    """Synthetic images and labels, read through a detector's own pipeline.

    The set's paths and class names come from the set itself.

    Args:
        data_root: Directory of a complete calibration set.
        metainfo: Further meta information; ``classes``, if given, must be the set's.
        **kwargs: Any further argument of MMDetection's ``CocoDataset``, such as ``pipeline``.

    Raises:
        UserError: If there is no complete set, or of another format version, or of other classes.
    """

    METAINFO: dict[str, Any] = {}

    def __init__(self, data_root: str, metainfo: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        classes = CalibrationSet.load(data_root).classes
        metainfo = dict(metainfo or {})
        if tuple(metainfo.setdefault('classes', classes)) != classes:
            raise UserError(
                f'metainfo names the classes {tuple(metainfo["classes"])}, the calibration set in '
                f'{data_root} has {classes}: leave them out, or make the set with this detector'
            )
        super().__init__(
            ann_file='annotations/instances.json',
            metainfo=metainfo,
            data_root=str(data_root),
            data_prefix={'img': 'images/'},
            **kwargs,
        )
