# SPDX-License-Identifier: Apache-2.0
"""Convert Ultralytics' weights of YOLO26 to the names of this package, see :mod:`mmzsq.converters.families`.

The branch with one location per object is converted, from which detections come. The branch with many locations per
object serves training alone and is left out.
"""

from __future__ import annotations

from torch import nn

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

is_yolo26 = YOLO26_FAMILY.matches
convert_yolo26 = YOLO26_FAMILY.convert
