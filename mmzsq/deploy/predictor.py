# SPDX-License-Identifier: Apache-2.0
"""Detectors that run exported files and keep MMDetection's own pre- and post-processing.

Sessions replace the network of a detector. Everything else, such as NMS, RoIAlign, rescaling and pasting of masks, is
the detector's own code. The evaluation of a file and that of its checkpoint therefore differ only by the engine.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from mmdet.models.dense_heads import YOLOV3Head, YOLOXHead
from mmdet.models.utils import filter_scores_and_topk
from mmdet.registry import MODELS
from mmdet.structures.bbox import get_box_tensor
from mmengine.config import ConfigDict
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn import functional as F

from mmzsq.deploy.heads import BOX_HEAD, DETECTOR, FEATURES, MASK_HEAD, box_heads, mask_heads, part_names, unflatten
from mmzsq.deploy.runtime import RUNTIMES, Session
from mmzsq.errors import UserError
from mmzsq.image_detector import ImageDetector


def detector_of(
    path: str | Path, model: Mapping[str, Any], runtime: str | None = None, threads: int = 0, precision: str = 'f32'
) -> Any:
    """Build a detector whose network is an exported file.

    The result is MMDetection's detector with all of its methods, ``test_step`` included: a Runner evaluates it. It
    cannot be trained and reads no checkpoint.

    Args:
        path: The main file that :func:`~mmzsq.deploy.export.export` wrote; those of a two-stage detector lie beside it.
        model: The section ``model`` of the float detector's config.
        runtime: ``'onnxruntime'`` or ``'openvino'``; by default as :func:`runtime_for` says.
        threads: Number of threads; 0 lets the runtime decide.
        precision: As of :class:`~mmzsq.deploy.runtime.Session`.

    Raises:
        UserError: If the file is missing, was not written by this package, belongs to another detector, or cannot run
            in the runtime.
    """
    path = Path(path)
    runtime = runtime_for(path, runtime)
    main = Session(path, runtime, threads, precision)
    # Building changes a config, and heads read attributes of their test_cfg.
    detector: Any = MODELS.build(ConfigDict(copy.deepcopy(dict(model)))).eval()
    if type(detector).__name__ != main.metadata['detector']:
        raise UserError(
            f'{path} holds a {main.metadata["detector"]}, but the config describes a {type(detector).__name__}.'
        )
    _load_buffers(detector, json.loads(main.metadata['buffers']))
    if main.metadata['outputs'] == 'two-stage':
        parts = {
            name: Session(path.with_name(file), runtime, threads, precision)
            for name, file in json.loads(main.metadata['parts']).items()
            if path.name != file
        }
        _attach_two_stage(detector, main, parts)
    else:
        _attach_dense(detector, main)
    classes = json.loads(main.metadata['classes'])
    if classes is not None:
        detector.dataset_meta = dict(classes=tuple(classes))
    return detector


def read_metadata(path: str | Path) -> dict[str, str]:
    """Read the metadata of an exported file.

    Raises:
        UserError: If the file is missing, is not ONNX, or was not written by this package.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f'{path} does not exist.')
    try:
        proto = onnx.load_from_string(path.read_bytes())
    except DecodeError as error:
        raise UserError(f'{path} is damaged or not an ONNX file: {error}. Export it again.') from error
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    if 'mmzsq_version' not in metadata:
        raise UserError(f'{path} was not written by `python -m mmzsq.export`: it has no metadata of this package.')
    if metadata['part'] not in (DETECTOR, FEATURES):
        raise UserError(
            f'{path} is the part {metadata["part"]} of a two-stage detector: name the main file, which has no name of '
            'a part before .onnx.'
        )
    return metadata


def runtime_for(path: str | Path, runtime: str | None = None) -> str:
    """Choose the runtime of an exported file.

    Args:
        path: The main file.
        runtime: The user's choice, or None.

    Returns:
        The choice; by default the target of the file, and ONNX Runtime for a file for TensorRT.

    Raises:
        UserError: As :func:`read_metadata`, and if OpenVINO is chosen for a file for TensorRT.
    """
    target = read_metadata(path)['target']
    if target == 'tensorrt' and runtime == 'openvino':
        raise UserError(
            f'{path} was exported for TensorRT with int8 activations, which OpenVINO computes wrongly behind a Concat: '
            'use --runtime onnxruntime, or export with --target openvino.'
        )
    if runtime is None:
        return target if target in RUNTIMES else 'onnxruntime'
    return runtime


class OnnxDetector(ImageDetector):
    """An exported file with the test pipeline of its config.

    Args:
        path: The main file.
        cfg: The config: ``model``, and the test pipeline in ``test_dataloader``.
        runtime: ``'onnxruntime'`` or ``'openvino'``; by default as :func:`runtime_for` says.
        threads: Number of threads; 0 lets the runtime decide.
        precision: As of :class:`~mmzsq.deploy.runtime.Session`.

    Attributes:
        detector: The detector that runs the file, see :func:`detector_of`.

    Example:
        >>> detector = OnnxDetector('yolov5-n.onnx', Config.fromfile('yolov5-n_w8a8.py'))  # doctest: +SKIP
        >>> detector(['street.jpg'])[0].pred_instances.scores  # doctest: +SKIP
    """

    def __init__(
        self, path: str | Path, cfg: Any, runtime: str | None = None, threads: int = 0, precision: str = 'f32'
    ) -> None:
        super().__init__(detector_of(path, cfg['model'], runtime, threads, precision), cfg)


def _load_buffers(detector: nn.Module, values: Mapping[str, Any]) -> None:
    buffers = dict(detector.named_buffers())
    for name, value in values.items():
        if name in buffers:
            buffers[name].copy_(torch.tensor(value, dtype=buffers[name].dtype))


def _attach_dense(detector: Any, session: Session) -> None:
    structure = json.loads(session.metadata['structure'])
    head = detector.bbox_head
    detector.extract_feat = lambda images: images
    detector.backbone = nn.Identity()
    if session.metadata['outputs'] == 'raw':
        head.forward = lambda images: unflatten(structure, run_images(session, images))
        return
    locations = json.loads(session.metadata.get('locations', '[]'))

    def forward(images: Tensor) -> tuple[Tensor, ...]:
        outputs = dict(zip(session.outputs, run_images(session, images), strict=True))
        return tuple(outputs[name] for name in ('boxes', 'scores', 'factors') if name in outputs)

    head.forward = forward
    head.predict_by_feat = lambda boxes, scores, factors=None, *, batch_img_metas, rescale=False, **_: [
        select(head, boxes[i], scores[i], None if factors is None else factors[i], locations, meta, rescale)
        for i, meta in enumerate(batch_img_metas)
    ]


def _attach_two_stage(detector: Any, main: Session, parts: Mapping[str, Session]) -> None:
    structure = json.loads(main.metadata['structure'])
    pending: list[Any] = []

    def extract_feat(images: Tensor) -> Any:
        features, rpn_maps = unflatten(structure, run_images(main, images))
        pending[:] = [tuple(rpn_maps)]
        return tuple(features)

    detector.extract_feat = extract_feat
    detector.backbone = nn.Identity()
    detector.rpn_head.forward = lambda features: pending[0]
    for kind, heads in ((BOX_HEAD, box_heads(detector.roi_head)), (MASK_HEAD, mask_heads(detector.roi_head))):
        for name, head in zip(part_names(kind, len(heads)), heads, strict=True):
            head.forward = _region_forward(parts[name])


def _region_forward(session: Session) -> Any:
    structure = json.loads(session.metadata['structure'])
    return lambda regions: unflatten(
        structure, [torch.from_numpy(array).to(regions.device) for array in session(regions.cpu().numpy())]
    )


def run_images(session: Session, images: Tensor) -> list[Tensor]:
    """Run images through a file of fixed size.

    Args:
        session: Its input is (N, 3, H, W).
        images: (N, 3, h, w), normalized, at most as large as the file's. They are padded at the bottom and at the
            right with the value that the data preprocessor pads a batch with.

    Returns:
        The outputs of the file, on the device of the images.

    Raises:
        UserError: If the images are larger than those that the file takes.
    """
    height, width = json.loads(session.metadata['size'])
    missing = height - images.shape[2], width - images.shape[3]
    if min(missing) < 0:
        raise UserError(
            f'The file takes images of {height}x{width} pixels (height x width), but the test pipeline made one of '
            f'{images.shape[2]}x{images.shape[3]}: export with --size {images.shape[2]} {images.shape[3]} or more.'
        )
    value = float(session.metadata['pad_value'])
    padded = F.pad(images, (0, missing[1], 0, missing[0]), value=value).float().cpu().contiguous().numpy()
    fixed = session.input_shape[0] == 1
    batches = [padded[index : index + 1] for index in range(len(padded))] if fixed else [padded]
    runs = [session(batch) for batch in batches]
    return [torch.from_numpy(np.concatenate(outputs)).to(images.device) for outputs in zip(*runs, strict=True)]


def select(
    head: Any,
    boxes: Tensor,
    scores: Tensor,
    factors: Tensor | None,
    locations: Sequence[int],
    meta: Mapping[str, Any],
    rescale: bool,
) -> InstanceData:
    """Select detections from decoded predictions of one image, as the head itself does.

    Args:
        head: The head of the detector.
        boxes: (P, 4), xyxy in pixels of the network's input.
        scores: (P, C), in [0, 1]; the products if there are factors.
        factors: Centerness or objectness (P,) of heads that compare scores with the threshold before they multiply,
            else None.
        locations: Locations of each level; their sum is P.
        meta: Of the image.
        rescale: Whether boxes refer to the original image.
    """
    if hasattr(head, 'post_processor'):
        certain = scores.new_ones(1, len(scores))
        selected: InstanceData = head.post_processor.process_batch(boxes[None], certain, scores[None], [meta], rescale)[
            0
        ]
        return selected
    cfg = copy.deepcopy(head.test_cfg)
    if isinstance(head, YOLOXHead):
        # One class for each location, and no limit before NMS.
        best, labels = scores.max(1)
        kept = best >= cfg.score_thr
        results = InstanceData(bboxes=boxes[kept], scores=best[kept], labels=labels[kept])
        processed: InstanceData = head._bbox_post_process(
            results=results, cfg=cfg, rescale=rescale, with_nms=True, img_meta=meta
        )
        return processed
    if factors is not None:
        scores = torch.where(factors[:, None] > 0, scores / factors[:, None], 0.0)
    if isinstance(head, YOLOV3Head):
        if factors is not None and cfg.get('conf_thr', -1) > 0:
            likely = factors >= cfg.conf_thr
            boxes, scores, factors = boxes[likely], scores[likely], factors[likely]
        # The limit before NMS counts all levels together.
        locations = [len(boxes)]
    found, start = [], 0
    for count in locations:
        level = slice(start, start + count)
        start += count
        values = dict(boxes=boxes[level]) if factors is None else dict(boxes=boxes[level], factors=factors[level])
        level_scores, labels, _, kept_values = filter_scores_and_topk(
            scores[level], cfg.get('score_thr', 0), cfg.get('nms_pre', -1), values
        )
        found.append(dict(kept_values, scores=level_scores, labels=labels))
    joined = {key: torch.cat([values[key] for values in found]) for key in found[0]}
    bboxes = joined['boxes']
    if getattr(getattr(head, 'bbox_coder', None), 'clip_border', False):
        height, width = meta['img_shape'][:2]
        bboxes = torch.stack((bboxes[:, 0::2].clamp(0, width), bboxes[:, 1::2].clamp(0, height)), -1).flatten(1)
    results = InstanceData(bboxes=get_box_tensor(bboxes), scores=joined['scores'], labels=joined['labels'])
    if factors is not None:
        results.score_factors = joined['factors']
    processed = head._bbox_post_process(results=results, cfg=cfg, rescale=rescale, with_nms=True, img_meta=meta)
    return processed
