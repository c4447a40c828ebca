# SPDX-License-Identifier: Apache-2.0
"""Non-maximum suppression as ONNX operators behind the decoded predictions of a dense detector.

The settings are those of the detector's ``test_cfg``, with two differences: there is no limit of candidates before
suppression (``nms_pre``), and boxes are not clipped to the image. A head without NMS, such as YOLO26's, gets the
selection of its best scores alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from mmdet.models.dense_heads import YOLOXHead
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torchvision.ops import batched_nms

from mmzsq.errors import UserError

DETECTIONS = 'detections'
LAYOUT = (
    '(D, 6), sorted by descending score: x1, y1, x2, y2 in pixels of the input of the network, score in [0, 1], '
    'index of the class'
)


@dataclass(frozen=True)
class NmsSettings:
    """Settings of the suppression.

    Attributes:
        iou_threshold: A box is dropped if its IoU with a better one of its class is higher. None: no box is dropped.
        score_threshold: Scores must be higher.
        max_detections: Largest number of detections of an image.
        one_class: Whether a location yields a detection of its best class alone.
    """

    iou_threshold: float | None
    score_threshold: float
    max_detections: int
    one_class: bool


def nms_of(head: Any) -> NmsSettings:
    """Read the settings of a dense head.

    Args:
        head: The ``bbox_head`` of a dense detector.

    Raises:
        UserError: If the detector suppresses boxes in another way than ONNX's operator.
    """
    own = getattr(head, 'post_processor', None)
    cfg = own or head.test_cfg
    settings = {key: _get(cfg, key) for key in ('nms', 'score_thr', 'max_per_img')}
    without = own is not None and own.nms is None
    nms = dict(settings['nms'] or {})
    if not without and (nms.get('type', 'nms') != 'nms' or 'iou_threshold' not in nms or nms.get('class_agnostic')):
        raise UserError(
            f"--nms writes class-wise NMS, dict(type='nms', iou_threshold=...), but test_cfg.nms of the detector is "
            f'{nms}: export without --nms and suppress boxes behind the file.'
        )
    limit = settings['max_per_img']
    if limit is None or limit < 1:
        raise UserError(f'--nms needs a positive test_cfg.max_per_img, but it is {limit}.')
    threshold = settings['score_thr'] or 0.0
    iou_threshold = None if without else float(nms['iou_threshold'])
    return NmsSettings(iou_threshold, float(threshold), int(limit), isinstance(head, YOLOXHead))


def append_nms(model: onnx.ModelProto, settings: NmsSettings) -> None:
    """Append suppression to a graph in place, as its third output ``detections``.

    Args:
        model: Its outputs are boxes (1, P, 4) and scores (1, P, C).
        settings: Thresholds and limit.
    """
    boxes, scores = (value.name for value in model.graph.output)
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def constant(name: str, value: Any, dtype: type) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, dtype=dtype), f'nms/{name}'))
        return f'nms/{name}'

    def add(op: str, inputs: list[str], name: str, outputs: int = 1, **attributes: Any) -> str:
        names = [f'nms/{name}'] + [f'nms/{name}_{index}' for index in range(1, outputs)]
        nodes.append(helper.make_node(op, inputs, names, name=f'nms/{name}/{op}', **attributes))
        return names[0]

    candidates = scores
    if settings.one_class:
        best = add('ReduceMax', [scores], 'best', axes=[2], keepdims=1)
        is_best = add('Equal', [scores, best], 'is_best')
        candidates = add('Where', [is_best, scores, constant('zero', 0, np.float32)], 'candidates')
    limit = constant('limit', [settings.max_detections], np.int64)
    score_threshold = constant('score_threshold', [settings.score_threshold], np.float32)
    if settings.iou_threshold is None:
        found = add('Reshape', [candidates, constant('flat', [-1], np.int64)], 'all_scores')
        kept = add('Min', [add('Shape', [found], 'count'), limit], 'kept')
        add('TopK', [found, kept], 'candidate', outputs=2, axis=0, largest=1, sorted=1)
        # A TopK of zero elements crashes OpenVINO, so that the threshold comes second.
        above = add('NonZero', [add('Greater', ['nms/candidate', score_threshold], 'is_above')], 'above')
        rows = add('Squeeze', [above, constant('only', [0], np.int64)], 'rows')
        top = add('Gather', ['nms/candidate', rows], 'top', axis=0)
        place = add('Gather', ['nms/candidate_1', rows], 'place', axis=0)
        classes = add('Gather', [add('Shape', [scores], 'shape'), constant('two', 2, np.int64)], 'classes', axis=0)
        location = add('Div', [place, classes], 'location')
        index = add('Mod', [place, classes], 'class')
    else:
        by_class = add('Transpose', [candidates], 'by_class', perm=[0, 2, 1])
        iou_threshold = constant('iou_threshold', [settings.iou_threshold], np.float32)
        selected = add('NonMaxSuppression', [boxes, by_class, limit, iou_threshold, score_threshold], 'selected')
        found = add('GatherND', [by_class, selected], 'scores')
        count = add('Shape', [found], 'count')
        kept = add('Min', [count, limit], 'kept')
        top = add('TopK', [found, kept], 'top', outputs=2, axis=0, largest=1, sorted=1)
        rows = add('Gather', [selected, 'nms/top_1'], 'rows', axis=0)
        location = add('Gather', [rows, constant('two', 2, np.int64)], 'location', axis=1)
        index = add('Gather', [rows, constant('one', 1, np.int64)], 'class', axis=1)
    label = add('Cast', [index], 'label', to=TensorProto.FLOAT)
    first = constant('first_axis', [0], np.int64)
    last = constant('last_axis', [1], np.int64)
    located = add('Gather', [add('Squeeze', [boxes, first], 'all_boxes'), location], 'boxes', axis=0)
    columns = [add('Unsqueeze', [value, last], f'{value[4:]}_column') for value in (top, label)]
    nodes.append(helper.make_node('Concat', [located, *columns], [DETECTIONS], name='nms/detections', axis=1))
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants)
    model.graph.output.append(helper.make_tensor_value_info(DETECTIONS, TensorProto.FLOAT, ['detections', 6]))
    onnx.checker.check_model(model)


def suppress(boxes: Tensor, scores: Tensor, settings: NmsSettings) -> Tensor:
    """Compute what :func:`append_nms` writes, with torchvision.

    Args:
        boxes: (P, 4), xyxy.
        scores: (P, C).
        settings: Thresholds and limit.

    Returns:
        (D, 6), see :data:`LAYOUT`.
    """
    if settings.one_class:
        scores = torch.where(scores == scores.amax(1, keepdim=True), scores, torch.zeros_like(scores))
    locations, labels = (scores > settings.score_threshold).nonzero(as_tuple=True)
    values, candidates = scores[locations, labels], boxes[locations]
    if settings.iou_threshold is None:
        kept = values.sort(descending=True, stable=True).indices
    else:
        kept = batched_nms(candidates.double(), values.double(), labels, settings.iou_threshold)
    kept = kept[: settings.max_detections]
    return torch.cat((candidates[kept], values[kept, None], labels[kept, None].to(values)), dim=1)


def _get(cfg: Any, key: str) -> Any:
    return getattr(cfg, key, None) if not hasattr(cfg, 'get') else cfg.get(key)
