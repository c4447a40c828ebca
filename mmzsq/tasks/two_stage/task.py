# SPDX-License-Identifier: Apache-2.0
"""Batched training loss of two-stage detectors, in which the host never waits for the device.

MMDetection assigns, samples, suppresses and crops masks image by image, with shapes that depend on values. This takes
the host ten times longer than the GPU needs, and cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.boxes import DeltaCoder
from mmzsq.errors import UserError
from mmzsq.models.padded_targets import PaddedTargets, pad_targets
from mmzsq.tasks.detection_task import DetectionTask
from mmzsq.tasks.prediction_maps import flatten_maps
from mmzsq.tasks.two_stage.anchors import AnchorTargets, assign_anchors, rpn_loss
from mmzsq.tasks.two_stage.losses import bbox_loss, mask_loss
from mmzsq.tasks.two_stage.roi_align import PyramidLayout, flatten_pyramid, roi_align
from mmzsq.tasks.two_stage.rois import RoIs, generate_proposals, sample_rois
from mmzsq.tasks.two_stage.support import proposal_settings

POINTS_PER_SIDE = 14
"""Sampling points across a box if the layer's sampling ratio is 0 (one point per cell of the bin).

A square box spans at most 28 cells of its level, and each point reads two cells. In a longer box, some cells between
the points are skipped.
"""


class _Precomputed(NamedTuple):
    """Values that depend only on the labels and on the sizes of the feature maps."""

    anchors: AnchorTargets
    levels: PyramidLayout


@dataclass
class TwoStageSamples:
    """Labels of N images, on the device.

    Attributes:
        labels: One entry per image with ``bboxes`` (n, 4) in xyxy pixels and ``labels`` (n,).
        targets: The same labels, padded to M per image.
        masks: Masks of the padded labels, (N, M, H, W), uint8, 1 inside the object; None for a detector without a mask
            head.
        image_size: Height and width in pixels.
        filler: The whole image as a box, (4,).
        precomputed: Computed by the first call of the loss, when the sizes of the feature maps are known.
    """

    labels: list[InstanceData]
    targets: PaddedTargets
    masks: Tensor | None
    image_size: tuple[int, int]
    filler: Tensor
    precomputed: _Precomputed | None = None


class TwoStageTask(DetectionTask):
    """Task of a Faster or Mask R-CNN, with a loss of fixed shapes.

    The loss has the terms, weights and averages of ``TwoStageDetector.loss``. It differs as follows:

    * The first stage uses other random numbers.
    * A step trains on ``rois_per_image`` boxes per image instead of 512, and computes masks for
      ``mask_rois_per_image`` of them instead of all positive boxes. Because the terms are means, their expectation is
      the same and only their variance grows.
    * Proposals are the ``proposals`` most confident boxes of all levels together, with NMS within each level.
      MMDetection first takes up to 2000 boxes from each level. The most confident boxes are the same in both cases.
    * ``jittered`` copies of each label are additional candidates if their IoU with the label makes them positive. An
      image that is still noise has no proposals near its labels, and without copies the label would be its only
      positive box.
    * RoIAlign uses a fixed number of sampling points per bin where a layer's sampling ratio is 0. The same holds for
      mask targets.

    Args:
        detector: A detector that :func:`~mmzsq.tasks.two_stage.unsupported_reason` accepts. It is set to eval mode and
            frozen.
        proposals: Number of proposals per image before NMS.
        rois_per_image: Number of boxes per image that the second stage is trained on.
        mask_rois_per_image: Maximum number of boxes per image for the mask loss.
        jittered: Number of jittered copies of each label.
        jitter: Maximum move of a side of a copy, as a fraction of its box's width or height.
    """

    is_batched = True

    def __init__(
        self,
        detector: nn.Module,
        proposals: int = 512,
        rois_per_image: int = 64,
        mask_rois_per_image: int = 8,
        jittered: int = 3,
        jitter: float = 0.15,
    ) -> None:
        super().__init__(detector)
        self.proposals = proposals
        self.rois_per_image = rois_per_image
        self.mask_rois_per_image = mask_rois_per_image
        self.jittered = jittered
        self.jitter = jitter
        self._rpn_coder = DeltaCoder.from_mmdet(self.detector.rpn_head.bbox_coder, self.device)
        self._coder = DeltaCoder.from_mmdet(self.detector.roi_head.bbox_head.bbox_coder, self.device)
        self._iou_thr = proposal_settings(self.detector)['nms']['iou_threshold']

    def data_samples(self, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> Any:
        """Move labels to the detector's device, in the form that :meth:`loss` takes.

        Args:
            labels: One entry per image with ``bboxes`` (n, 4) in xyxy pixels of the image, ``labels`` (n,), and for a
                detector with a mask head ``masks`` (n, H, W), bool.
            image_size: Height and width in pixels.

        Returns:
            A :class:`TwoStageSamples`.

        Raises:
            UserError: If the detector has a mask head and the labels have no masks.
        """
        on_device = [
            InstanceData(bboxes=entry.bboxes.to(self.device), labels=entry.labels.to(self.device)) for entry in labels
        ]
        height, width = image_size
        filler = torch.tensor([0.0, 0.0, width, height], device=self.device)
        targets = pad_targets(on_device, max(1, *(len(entry) for entry in labels)))
        targets = targets._replace(bboxes=torch.where(targets.valid[..., None], targets.bboxes, filler))
        masks = None
        if self.needs_masks:
            if not all('masks' in entry for entry in labels):
                raise UserError(f'{type(self.detector).__name__} has a mask head, but the labels have no masks')
            masks = torch.zeros(len(labels), targets.labels.shape[1], height, width, dtype=torch.uint8)
            for padded, entry in zip(masks, labels, strict=True):
                padded[: len(entry)] = entry.masks
            masks = masks.to(self.device)
        return TwoStageSamples(on_device, targets, masks, image_size, filler)

    def loss(self, images: Tensor, samples: Any) -> Tensor:
        """Compute the training loss.

        Args:
            images: Shape (N, 3, H, W), in [0, 1].
            samples: Return value of :meth:`data_samples`.

        Returns:
            A scalar.
        """
        rpn_head, roi_head = self.detector.rpn_head, self.detector.roi_head
        feats = self.detector.extract_feat(self.normalize(images))
        rpn_logits, rpn_deltas = rpn_head(feats)
        if samples.precomputed is None:
            samples.precomputed = self._precompute(rpn_logits, feats, samples)
        logits = flatten_maps(rpn_logits, 1).squeeze(-1)
        deltas = flatten_maps(rpn_deltas, 4)
        total = rpn_loss(rpn_head, logits, deltas, samples.precomputed.anchors)

        rois = self.sample_rois(logits, deltas, samples)
        rows = flatten_pyramid(feats[: roi_head.bbox_roi_extractor.num_inputs])
        features = _extract(roi_head.bbox_roi_extractor, rows, samples.precomputed.levels, rois)
        classes, offsets = roi_head.bbox_head(features)
        pos_weight = roi_head.train_cfg.pos_weight
        total = total + bbox_loss(roi_head.bbox_head, classes, offsets, rois, samples.targets, self._coder, pos_weight)
        if samples.masks is not None:
            rois = rois.truncate(self.mask_rois_per_image)
            features = _extract(roi_head.mask_roi_extractor, rows, samples.precomputed.levels, rois)
            masks = roi_head.mask_head(features)
            total = total + mask_loss(roi_head.mask_head, masks, rois, samples.targets, samples.masks)
        return total

    @torch.no_grad()
    def sample_rois(self, logits: Tensor, deltas: Tensor, samples: TwoStageSamples) -> RoIs:
        """Sample the boxes that the second stage is trained on.

        Args:
            logits: Objectness logit of every anchor, (N, A).
            deltas: Box offsets of every anchor, (N, A, 4).
            samples: The labels, with ``precomputed`` set.
        """
        assert samples.precomputed is not None
        roi_head = self.detector.roi_head
        size = samples.image_size
        proposals = generate_proposals(
            logits, deltas, samples.precomputed.anchors, self._rpn_coder, size, self.proposals, self._iou_thr
        )
        return sample_rois(
            proposals,
            samples.targets,
            roi_head.bbox_assigner,
            size,
            samples.filler,
            self.rois_per_image,
            roi_head.bbox_sampler.pos_fraction,
            self.jittered,
            self.jitter,
        )

    def _precompute(
        self, rpn_maps: Sequence[Tensor], feats: Sequence[Tensor], samples: TwoStageSamples
    ) -> _Precomputed:
        extractor = self.detector.roi_head.bbox_roi_extractor
        anchors = assign_anchors(
            self.detector.rpn_head, _sizes(rpn_maps), samples.labels, samples.image_size, self._rpn_coder
        )
        scales = [layer.spatial_scale for layer in extractor.roi_layers]
        levels = PyramidLayout.build(_sizes(feats[: extractor.num_inputs]), scales, len(samples.labels), self.device)
        return _Precomputed(anchors, levels)


def _sizes(maps: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(level.shape[2], level.shape[3]) for level in maps]


def _extract(extractor: Any, rows: Tensor, levels: PyramidLayout, rois: RoIs) -> Tensor:
    """Extract the features of every box as a ``SingleRoIExtractor`` does.

    Args:
        extractor: A ``SingleRoIExtractor``.
        rows: Features of all levels, see :func:`~mmzsq.tasks.two_stage.roi_align.flatten_pyramid`.
        levels: Layout of ``rows``.
        rois: R boxes in each of N images.

    Returns:
        Shape (N*R, C, bins, bins).
    """
    layer = extractor.roi_layers[0]
    image = torch.arange(len(rois.bboxes), device=rows.device)[:, None].expand(-1, rois.bboxes.shape[1]).flatten()
    bboxes = rois.bboxes.flatten(0, 1)
    level = extractor.map_roi_levels(torch.cat((image[:, None], bboxes), dim=1), len(levels.heights))
    samples = layer.sampling_ratio or max(1, POINTS_PER_SIDE // max(layer.output_size))
    return roi_align(rows, levels, image, level, bboxes, layer.output_size, samples, layer.aligned)
