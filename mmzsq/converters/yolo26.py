# SPDX-License-Identifier: Apache-2.0
"""Convert Ultralytics' weights of YOLO26 to the names of this package, see :mod:`mmzsq.converters.families`.

The branch with one location per object is converted, from which detections come. The branch with many locations per
object serves training alone and is left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mmzsq.converters.conversion import ConvertedDetector
from mmzsq.converters.families import INSIDE, Family
from mmzsq.converters.yolo11 import ATTENTION, LAYERS, ONE_TO_ONE_CLASSES, SIZES, Size
from mmzsq.models.yolo26.backbone import YOLO26CSPDarknet
from mmzsq.models.yolo26.head import YOLO26Head
from mmzsq.models.yolo26.neck import YOLO26PAFPN

BRANCHES = ((r'\.box_convs\.', '.one2one_cv2.'), (r'\.cls_convs\.', '.one2one_cv3.'))
"""Patterns and replacements for the names of the head."""


def build(size: Size, num_classes: int) -> dict[str, nn.Module]:
    """Build the parts of a YOLO26 by attribute name.

    Args:
        size: The size, a size of YOLO11.
        num_classes: Number of classes.
    """
    return {
        'backbone': YOLO26CSPDarknet(*size),
        'neck': YOLO26PAFPN(size.deepen_factor, size.widen_factor, size.max_channels),
        'bbox_head': YOLO26Head(num_classes, size.widen_factor, size.max_channels),
    }


YOLO26_FAMILY = Family(
    'YOLO26',
    SIZES,
    LAYERS,
    YOLO26CSPDarknet.stem_width,
    YOLO26CSPDarknet.depth,
    (ONE_TO_ONE_CLASSES, ATTENTION),
    build,
    inside=(*BRANCHES, *INSIDE),
    unused=r'model\.23\.cv[23]\.\d\..+',
)


def is_yolo26(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether tensors under Ultralytics' names have the attention and the head of a YOLO26."""
    return YOLO26_FAMILY.matches(tensors)


def convert_yolo26(tensors: Mapping[str, Tensor]) -> ConvertedDetector:
    """Rename Ultralytics' tensors and check them.

    Args:
        tensors: Parameters and buffers under Ultralytics' names, with separate batch norms.

    Returns:
        Weights of a :class:`~mmzsq.models.yolo26.YOLO26`; ``size`` is a key of :data:`SIZES`.

    Raises:
        UserError: If they are not the weights of a YOLO26. The message lists tensors that are missing, unexpected or of
            the wrong shape.
    """
    return YOLO26_FAMILY.convert(tensors)
