# SPDX-License-Identifier: Apache-2.0
"""A detector as synthesis sees it: a loss for labels, predictions for images, both on images in [0, 1].

Nothing here knows an architecture: the loss is ``detector.loss``, the labels are ``detector.predict``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from mmzsq.errors import UserError
from mmzsq.masks import mask_boxes
from mmzsq.models.train_eval_modes import frozen_train_mode, single_process
from mmzsq.synthesis.label_samplers import LabelPrior
from mmzsq.tasks.label_prior import label_prior


def sum_losses(losses: Mapping[str, Any]) -> Tensor:
    """Sum what MMEngine's ``parse_losses`` would: every value whose key contains ``loss``, lists included."""
    terms: list[Tensor] = []
    for name, value in losses.items():
        if 'loss' in name:
            terms.extend(value if isinstance(value, Sequence) else [value])
    return torch.stack([term.mean() for term in terms]).sum()


def num_classes(detector: nn.Module) -> int:
    """Number of categories that a detector tells apart.

    Raises:
        UserError: If no head has an attribute ``num_classes``.
    """
    for path in ('bbox_head', 'roi_head.bbox_head', 'mask_head'):
        head: Any = detector
        for name in path.split('.'):
            head = getattr(head, name, None)
        if isinstance(head, nn.ModuleList):
            head = head[0]
        if head is not None and hasattr(head, 'num_classes'):
            return int(head.num_classes)
    raise UserError(f'{type(detector).__name__} has no head with `num_classes`: set it on its bbox_head or roi_head')


def needs_masks(detector: nn.Module) -> bool:
    """Whether a detector learns instance masks, and therefore has to be shown some.

    It does if it has a mask head: of its own or in its RoI head, or, as RTMDet-Ins, inside its box head.
    """
    return bool(getattr(detector, 'with_mask', False)) or hasattr(getattr(detector, 'bbox_head', None), 'mask_head')


def data_samples(
    labels: Sequence[InstanceData], image_size: tuple[int, int], device: torch.device
) -> list[DetDataSample]:
    """Wrap labels as MMDetection's detectors take them.

    Args:
        labels: One entry an image; ``bboxes`` (n, 4) xyxy in pixels of the image, ``labels`` (n,), and perhaps
            ``masks`` (n, H, W) bool, which become ``BitmapMasks`` and stay on the CPU, as in training.
        image_size: Height and width in pixels.
        device: Where the boxes go.
    """
    nothing = no_instances().to(device)
    samples = []
    for instances in labels:
        sample = DetDataSample(
            metainfo=dict(
                img_shape=image_size,
                ori_shape=image_size,
                pad_shape=image_size,
                batch_input_shape=image_size,
                scale_factor=(1.0, 1.0),
                flip=False,
                # Where the image lies in its canvas, top, bottom, left and right: CenterNet's takes it off.
                border=(0, image_size[0], 0, image_size[1]),
            )
        )
        sample.gt_instances = InstanceData(bboxes=instances.bboxes.to(device), labels=instances.labels.to(device))
        if 'masks' in instances:
            sample.gt_instances.masks = BitmapMasks(instances.masks.numpy().astype(np.uint8), *image_size)
        sample.ignored_instances = nothing
        samples.append(sample)
    return samples


def no_instances() -> InstanceData:
    """Labels of an image without objects."""
    return InstanceData(bboxes=torch.zeros((0, 4)), labels=torch.zeros((0,), dtype=torch.long))


def blank_samples(count: int, image_size: tuple[int, int], device: torch.device) -> list[DetDataSample]:
    """Data samples of ``count`` images of ``image_size`` (height, width) without labels."""
    return data_samples([no_instances()] * count, image_size, device)


def normalization(data_preprocessor: nn.Module) -> tuple[Tensor, Tensor]:
    """Mean and deviation by which a detector normalizes pixels in [0, 255], each (3, 1, 1); (1, 1, 1) without any."""
    mean, std = (
        torch.as_tensor(getattr(data_preprocessor, name, neutral)).float().view(-1, 1, 1)
        for name, neutral in (('mean', 0.0), ('std', 1.0))
    )
    return mean, std


def pixel_range(data_preprocessor: nn.Module) -> tuple[Tensor, Tensor]:
    """What black and white become under a detector's normalization, each (3, 1, 1); 0 and 255 without any."""
    mean, std = normalization(data_preprocessor)
    return (0 - mean) / std, (255 - mean) / std


def whole_image_samples(count: int, image_size: tuple[int, int], device: torch.device) -> list[DetDataSample]:
    """Data samples of ``count`` images of ``image_size`` (height, width), each one object of the first category."""
    height, width = image_size
    whole_image = InstanceData(
        bboxes=torch.tensor([[0.0, 0.0, width, height]]), labels=torch.zeros(1, dtype=torch.long)
    )
    return data_samples([whole_image] * count, image_size, device)


def semantic_criterion(detector: nn.Module) -> nn.Module | None:
    """The loss of a detector's semantic branch, which wants a category for every pixel; None without such a branch."""
    for owner in (detector, getattr(detector, 'roi_head', None)):
        head = getattr(owner, 'semantic_head', None)
        for name in ('criterion', 'loss_seg'):
            if isinstance(getattr(head, name, None), nn.Module):
                return getattr(head, name)
    return None


def leave_semantics_out(detector: nn.Module, samples: Sequence[DetDataSample]) -> None:
    """Give ``samples`` the semantic labels that the loss of ``detector`` wants: ignore every pixel.

    What a pixel beside the objects shows, nobody knows, and the categories of a semantic branch, "stuff" among them,
    are not those of the objects. So the branch adds nothing to the loss.

    Args:
        detector: Any detector; nothing is done if it has no semantic branch.
        samples: Changed in place; those that have semantic labels keep them.
    """
    criterion = semantic_criterion(detector)
    if criterion is None:
        return
    ignore_index = getattr(criterion, 'ignore_index', None)
    for sample in samples:
        if 'gt_sem_seg' not in sample:
            pixels = torch.full((1, *sample.batch_input_shape), -100 if ignore_index is None else ignore_index)
            sample.gt_sem_seg = PixelData(sem_seg=pixels.to(sample.gt_instances.bboxes.device))


class DetectionTask:
    """The full-precision detector and its view of images in [0, 1].

    Args:
        detector: A trained detector; set to eval mode and frozen.

    Attributes:
        num_classes: Number of categories.
        needs_masks: Whether labels need instance masks, and predictions have them.
        channel_order: ``'rgb'`` or ``'bgr'``.
        note: What a user should know about this choice of task, for the log; None if nothing.
    """

    def __init__(self, detector: nn.Module) -> None:
        self.detector: Any = detector.eval().requires_grad_(False)
        self.note: str | None = None
        self.num_classes = num_classes(detector)
        self.needs_masks = needs_masks(detector)
        preprocessor: Any = detector.data_preprocessor
        # Files hold BGR once OpenCV has read them; the images here are in the order that the network takes.
        self.channel_order = 'rgb' if getattr(preprocessor, '_channel_conversion', False) else 'bgr'
        mean, std = normalization(preprocessor)
        self._is_normalized = bool((mean == 0).all() and (std == 255).all())
        self._mean, self._std = mean.to(self.device), std.to(self.device)
        self._shift, self._scale = (-mean / std).to(self.device), (255 / std).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the detector is."""
        return next(self.detector.parameters()).device

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize images as the detector's data preprocessor does.

        Args:
            images: Shape (N, 3, H, W), in [0, 1], channels in :attr:`channel_order`.

        Returns:
            What the network takes, the same shape.
        """
        # On a GPU what counts is how often all pixels are read.
        return images if self._is_normalized else torch.addcmul(self._shift, images, self._scale)

    def denormalize(self, inputs: Tensor) -> Tensor:
        """Undo :meth:`normalize`: images in [0, 1], (N, 3, H, W), of what the network takes."""
        return (inputs * self._std + self._mean) / 255

    def label_prior(self) -> LabelPrior:
        """What the detector's weights tell of the labels that it was trained on."""
        return label_prior(self.detector, self.num_classes)

    def data_samples(self, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> list[DetDataSample]:
        """Wrap labels as MMDetection's losses take them, on the detector's device; see :func:`data_samples`."""
        return data_samples(labels, image_size, self.device)

    def update_samples(self, samples: Any, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> bool:
        """Put other labels into what :meth:`data_samples` returned, in place, so that a captured step sees them.

        Args:
            samples: Of the labels before; left as they are if this returns False.
            labels: The new ones, as for :meth:`data_samples`.
            image_size: Height and width in pixels.

        Returns:
            Whether that is possible.
        """
        return False

    def loss(self, images: Tensor, samples: Sequence[DetDataSample]) -> Tensor:
        """Return the detector's own training loss for ``images`` (N, 3, H, W) in [0, 1], a scalar.

        Raises:
            UserError: If that takes a package which is not installed.
        """
        copies = [_shallow_copy(sample) for sample in samples]
        leave_semantics_out(self.detector, copies)
        try:
            with frozen_train_mode(self.detector), single_process():
                return sum_losses(self.detector.loss(self.normalize(images), copies))
        except ImportError as error:
            raise UserError(f'the loss of {type(self.detector).__name__} needs another package: {error}') from error

    @torch.no_grad()
    def predict(self, images: Tensor) -> list[InstanceData]:
        """Return what the detector finds.

        Args:
            images: Shape (N, 3, H, W), in [0, 1].

        Returns:
            One entry an image, on the CPU: ``bboxes`` (n, 4) xyxy pixels, ``scores``, ``labels`` (n,), and ``masks``
            (n, H, W) bool where the detector predicts masks. A detector without a box head bounds its masks.
        """
        size = (images.shape[2], images.shape[3])
        samples = blank_samples(len(images), size, self.device)
        results = self.detector.predict(self.normalize(images), samples, rescale=False)
        predictions = []
        for result in results:
            found = result.pred_instances
            kept = InstanceData(bboxes=found.bboxes, scores=found.scores, labels=found.labels)
            if self.needs_masks:
                # RTMDet-Ins predicts as far as its feature maps reach, past the edges of the image.
                kept.masks = found.masks[:, : size[0], : size[1]].bool()
                if not self.detector.with_bbox:
                    kept.bboxes = mask_boxes(kept.masks)
            predictions.append(kept.to('cpu'))
        return predictions


def _shallow_copy(sample: DetDataSample) -> DetDataSample:
    """Let a loss replace fields of the labels, as RTMDet-Ins does with the masks, without the next step seeing it."""
    copy = sample.new()
    copy.gt_instances = sample.gt_instances.new()
    return copy
