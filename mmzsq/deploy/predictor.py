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
import torch
from mmcv.transforms import Compose
from mmdet.models.dense_heads import YOLOV3Head, YOLOXHead
from mmdet.models.utils import filter_scores_and_topk
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn import functional as F

from mmzsq.deploy.heads import BOX_HEAD, MASK_HEAD, box_heads, mask_heads, part_names, unflatten
from mmzsq.deploy.runtime import Session
from mmzsq.errors import UserError


def detector_of(
    path: str | Path, model: Mapping[str, Any], runtime: str = 'openvino', threads: int = 0, precision: str = 'f32'
) -> Any:
    """Build a detector whose network is an exported file.

    The result is MMDetection's detector with all of its methods, ``test_step`` included: a Runner evaluates it. It
    cannot be trained and reads no checkpoint.

    Args:
        path: The main file that :func:`~mmzsq.deploy.export.export` wrote; those of a two-stage detector lie beside it.
        model: The section ``model`` of the float detector's config.
        runtime: ``'onnxruntime'`` or ``'openvino'``.
        threads: Number of threads; 0 lets the runtime decide.
        precision: As of :class:`~mmzsq.deploy.runtime.Session`.

    Raises:
        UserError: If the file is missing, was not written by this package, or belongs to another detector.
    """
    path = Path(path)
    main = Session(path, runtime, threads, precision)
    if 'mmzsq_version' not in main.metadata:
        raise UserError(f'{path} was not written by `python -m mmzsq.export`: it has no metadata of this package.')
    # Building changes a config.
    detector: Any = MODELS.build(copy.deepcopy(dict(model))).eval()
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


class OnnxDetector:
    """An exported file with the test pipeline of its config.

    Args:
        path: The main file.
        cfg: The config: ``model``, and the test pipeline in ``test_dataloader``.
        runtime: ``'onnxruntime'`` or ``'openvino'``.
        threads: Number of threads; 0 lets the runtime decide.
        precision: As of :class:`~mmzsq.deploy.runtime.Session`.

    Attributes:
        detector: The detector that runs the file, see :func:`detector_of`.

    Example:
        >>> detector = OnnxDetector('yolov5-n.onnx', Config.fromfile('yolov5-n_w8a8.py'))  # doctest: +SKIP
        >>> detector(['street.jpg'])[0].pred_instances.scores  # doctest: +SKIP
    """

    def __init__(
        self, path: str | Path, cfg: Any, runtime: str = 'openvino', threads: int = 0, precision: str = 'f32'
    ) -> None:
        self.detector = detector_of(path, cfg['model'], runtime, threads, precision)
        self._load, self._loaded = pipelines_of(cfg)

    @torch.no_grad()
    def __call__(self, images: Sequence[str | Path | np.ndarray]) -> list[DetDataSample]:
        """Detect objects.

        Args:
            images: Paths, or arrays (H, W, 3) of uint8 in the order B, G, R, as OpenCV reads them.

        Returns:
            One data sample for each image; boxes are in pixels of the image as given.
        """
        results: list[DetDataSample] = []
        for image in images:
            data = self._prepare(image)
            results += self.detector.test_step(dict(inputs=[data['inputs']], data_samples=[data['data_samples']]))
        return results

    def _prepare(self, image: str | Path | np.ndarray) -> Any:
        if isinstance(image, np.ndarray):
            return self._loaded(dict(img=image, img_id=0))
        if not Path(image).is_file():
            raise UserError(f'{image} does not exist.')
        return self._load(dict(img_path=str(image), img_id=0))


def pipelines_of(cfg: Any) -> tuple[Compose, Compose]:
    """Build the test pipeline of a config without annotations.

    Args:
        cfg: A config with ``test_dataloader``.

    Returns:
        The pipeline for paths, and the one for images that are loaded.
    """
    transforms = [copy.deepcopy(dict(t)) for t in cfg['test_dataloader']['dataset']['pipeline']]
    kept = [t for t in transforms if not str(t['type']).rpartition('.')[2].startswith('LoadAnnotations')]
    loaded = [copy.deepcopy(t) for t in kept]
    loaded[0] = dict(type='mmdet.LoadImageFromNDArray')
    return _compose(kept), _compose(loaded)


def _compose(transforms: list[dict[str, Any]]) -> Compose:
    from mmdet.registry import TRANSFORMS

    return Compose([TRANSFORMS.build(transform) for transform in transforms])


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
    head.forward = lambda images: tuple(run_images(session, images))
    head.predict_by_feat = lambda boxes, scores, batch_img_metas, rescale=False, **_: [
        select(head, boxes[index], scores[index], locations, meta, rescale)
        for index, meta in enumerate(batch_img_metas)
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
    return lambda regions: unflatten(structure, [torch.from_numpy(a) for a in session(regions.cpu().numpy())])


def run_images(session: Session, images: Tensor) -> list[Tensor]:
    """Run images through a file of fixed size.

    Args:
        session: Its input is (N, 3, H, W).
        images: (N, 3, h, w), normalized, at most as large as the file's. They are padded with 0 at the bottom and at
            the right.

    Returns:
        The outputs of the file.

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
    padded = F.pad(images, (0, missing[1], 0, missing[0])).float().cpu().contiguous().numpy()
    fixed = session.input_shape[0] == 1
    batches = [padded[index : index + 1] for index in range(len(padded))] if fixed else [padded]
    runs = [session(batch) for batch in batches]
    return [torch.from_numpy(np.concatenate(outputs)) for outputs in zip(*runs, strict=True)]


def select(
    head: Any, boxes: Tensor, scores: Tensor, locations: Sequence[int], meta: Mapping[str, Any], rescale: bool
) -> InstanceData:
    """Select detections from decoded predictions of one image, as the head's settings say.

    Scores that a head multiplies by centerness or objectness are compared with the threshold after that product here,
    and before it in some of MMDetection's heads: an evaluation that must equal the checkpoint's takes a raw file.

    Args:
        head: The head of the detector.
        boxes: (P, 4), xyxy in pixels of the network's input.
        scores: (P, C), in [0, 1].
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
    if isinstance(head, YOLOV3Head):
        # The limit before NMS counts all levels together.
        locations = [len(boxes)]
    found = []
    for level_boxes, level_scores in zip(boxes.split(list(locations)), scores.split(list(locations)), strict=True):
        kept = filter_scores_and_topk(
            level_scores, cfg.get('score_thr', 0), cfg.get('nms_pre', -1), dict(boxes=level_boxes)
        )
        found.append((kept[0], kept[1], kept[3]['boxes']))
    bboxes = torch.cat([level[2] for level in found])
    if getattr(getattr(head, 'bbox_coder', None), 'clip_border', False):
        height, width = meta['img_shape'][:2]
        bboxes = torch.stack((bboxes[:, 0::2].clamp(0, width), bboxes[:, 1::2].clamp(0, height)), -1).flatten(1)
    results = InstanceData(
        bboxes=get_box_tensor(bboxes),
        scores=torch.cat([level[0] for level in found]),
        labels=torch.cat([level[1] for level in found]),
    )
    processed = head._bbox_post_process(results=results, cfg=cfg, rescale=rescale, with_nms=True, img_meta=meta)
    return processed
