# SPDX-License-Identifier: Apache-2.0
"""The training loss of a two-stage detector as one computation over a batch, which never waits for the device.

MMDetection assigns, samples, suppresses and crops masks image by image, with shapes that depend on values. That keeps
the host busy ten times longer than a GPU and cannot be captured into a CUDA graph.
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
from mmzsq.tasks.two_stage.roi_align import Levels, roi_align, stack_rows
from mmzsq.tasks.two_stage.rois import RoIs, choose_rois, propose
from mmzsq.tasks.two_stage.support import proposal_settings

POINTS_PER_SIDE = 14
"""Points across a box where RoIAlign would take as many as the box has cells: a square box spans at most 28 cells of
its level, and a point reads two. Between the points of a longer one cells are left out."""


class _Plan(NamedTuple):
    """What depends on the labels and on the sizes of the feature maps."""

    anchors: AnchorTargets
    levels: Levels


@dataclass
class TwoStageSamples:
    """The labels of N images, on the device.

    Attributes:
        labels: One entry an image: ``bboxes`` (n, 4), xyxy in pixels, ``labels`` (n,).
        targets: The same, padded to M an image.
        masks: Theirs, (N, M, H, W), uint8, 1 inside; None for a detector without a mask head.
        image_size: Height and width in pixels.
        filler: The whole image as a box, (4,).
        plan: Made by the first loss, which is where the sizes of the feature maps are known.
    """

    labels: list[InstanceData]
    targets: PaddedTargets
    masks: Tensor | None
    image_size: tuple[int, int]
    filler: Tensor
    plan: _Plan | None = None


class TwoStageTask(DetectionTask):
    """A Faster or Mask R-CNN as synthesis sees it, with a loss of fixed shapes.

    It stands for ``TwoStageDetector.loss``: every term, weight and average is MMDetection's. What differs:

    * The first stage is the same, with other random numbers.
    * A step learns from ``rois_per_image`` boxes an image instead of 512, ``mask_rois_per_image`` of them with masks
      instead of all that answer for a label. The terms are means, so they keep their size and only get noisier.
    * Proposals are the ``proposals`` most confident boxes over all levels, suppressed within each level. MMDetection
      takes up to 2000 of each level first; of a list sorted by confidence the head is the same.
    * ``jittered`` copies of each label are candidates too, if they overlap it enough to be positive. An image that is
      still noise has no proposal near its labels, and the label alone is one box where a proposal would be several.
    * RoIAlign reads a fixed number of points in each bin where a layer says "as many as there are cells"; so do the
      targets of masks.

    Args:
        detector: A detector that :func:`~mmzsq.tasks.two_stage.unsupported_reason` accepts; set to eval mode, frozen.
        proposals: Boxes of the first stage before suppression, an image.
        rois_per_image: Boxes that the second stage learns from, an image.
        mask_rois_per_image: How many of those that answer for a label have their mask learnt, an image.
        jittered: Jittered copies of each label.
        jitter: Most that a side of such a copy moves, as a part of its box's width or height.
    """

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
        self._rpn_coder = DeltaCoder.of(self.detector.rpn_head.bbox_coder, self.device)
        self._coder = DeltaCoder.of(self.detector.roi_head.bbox_head.bbox_coder, self.device)
        self._iou_thr = proposal_settings(self.detector)['nms']['iou_threshold']

    def data_samples(self, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> Any:
        """Put labels on the detector's device as :meth:`loss` takes them.

        Args:
            labels: One entry an image; ``bboxes`` (n, 4) xyxy in pixels of the image, ``labels`` (n,), and for a
                detector with a mask head ``masks`` (n, H, W), bool.
            image_size: Height and width in pixels.

        Returns:
            The :class:`TwoStageSamples`.

        Raises:
            UserError: If the detector learns masks and the labels have none.
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
                raise UserError(f'{type(self.detector).__name__} learns masks, but the labels have none')
            masks = torch.zeros(len(labels), targets.labels.shape[1], height, width, dtype=torch.uint8)
            for padded, entry in zip(masks, labels, strict=True):
                padded[: len(entry)] = entry.masks
            masks = masks.to(self.device)
        return TwoStageSamples(on_device, targets, masks, image_size, filler)

    def loss(self, images: Tensor, samples: Any) -> Tensor:
        """Return the training loss for ``images`` (N, 3, H, W) in [0, 1], a scalar.

        Args:
            images: As in the base class.
            samples: From :meth:`data_samples`.
        """
        rpn_head, roi_head = self.detector.rpn_head, self.detector.roi_head
        feats = self.detector.extract_feat(self.normalize(images))
        rpn_logits, rpn_deltas = rpn_head(feats)
        if samples.plan is None:
            samples.plan = self._plan(rpn_logits, feats, samples)
        logits = flatten_maps(rpn_logits, 1).squeeze(-1)
        deltas = flatten_maps(rpn_deltas, 4)
        total = rpn_loss(rpn_head, logits, deltas, samples.plan.anchors)

        rois = self.choose_rois(logits, deltas, samples)
        rows = stack_rows(feats[: roi_head.bbox_roi_extractor.num_inputs])
        features = _extract(roi_head.bbox_roi_extractor, rows, samples.plan.levels, rois)
        classes, offsets = roi_head.bbox_head(features)
        pos_weight = roi_head.train_cfg.pos_weight
        total = total + bbox_loss(roi_head.bbox_head, classes, offsets, rois, samples.targets, self._coder, pos_weight)
        if samples.masks is not None:
            rois = rois.first(self.mask_rois_per_image)
            features = _extract(roi_head.mask_roi_extractor, rows, samples.plan.levels, rois)
            masks = roi_head.mask_head(features)
            total = total + mask_loss(roi_head.mask_head, masks, rois, samples.targets, samples.masks)
        return total

    @torch.no_grad()
    def choose_rois(self, logits: Tensor, deltas: Tensor, samples: TwoStageSamples) -> RoIs:
        """Choose the boxes that the second stage is to learn from.

        Args:
            logits: Objectness of every anchor, (N, A).
            deltas: Box offsets of every anchor, (N, A, 4).
            samples: Whose loss was begun.
        """
        assert samples.plan is not None
        roi_head = self.detector.roi_head
        size = samples.image_size
        proposals = propose(logits, deltas, samples.plan.anchors, self._rpn_coder, size, self.proposals, self._iou_thr)
        return choose_rois(
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

    def _plan(self, rpn_maps: Sequence[Tensor], feats: Sequence[Tensor], samples: TwoStageSamples) -> _Plan:
        extractor = self.detector.roi_head.bbox_roi_extractor
        anchors = assign_anchors(
            self.detector.rpn_head, _sizes(rpn_maps), samples.labels, samples.image_size, self._rpn_coder
        )
        scales = [layer.spatial_scale for layer in extractor.roi_layers]
        levels = Levels.of(_sizes(feats[: extractor.num_inputs]), scales, len(samples.labels), self.device)
        return _Plan(anchors, levels)


def _sizes(maps: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(level.shape[2], level.shape[3]) for level in maps]


def _extract(extractor: Any, rows: Tensor, levels: Levels, rois: RoIs) -> Tensor:
    """What a ``SingleRoIExtractor`` reads of the features ``rows`` in every box: (N*R, C, bins, bins)."""
    layer = extractor.roi_layers[0]
    image = torch.arange(len(rois.bboxes), device=rows.device)[:, None].expand(-1, rois.bboxes.shape[1]).flatten()
    bboxes = rois.bboxes.flatten(0, 1)
    level = extractor.map_roi_levels(torch.cat((image[:, None], bboxes), dim=1), len(levels.heights))
    samples = layer.sampling_ratio or max(1, POINTS_PER_SIDE // max(layer.output_size))
    return roi_align(rows, levels, image, level, bboxes, layer.output_size, samples, layer.aligned)
