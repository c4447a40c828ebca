# SPDX-License-Identifier: Apache-2.0
"""The general detection task, which works with any MMDetection detector.

It is independent of the architecture: the loss is ``detector.loss`` and the labels come from ``detector.predict``. Both
take images in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmdet.models.detectors import MaskFormer
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmzsq.errors import UserError
from mmzsq.masks import mask_boxes
from mmzsq.models.multi_instance_roi_head import accept_few_objects
from mmzsq.models.train_eval_modes import frozen_train_mode, single_process
from mmzsq.synthesis.label_samplers import LabelPrior
from mmzsq.tasks.label_prior import label_prior
from mmzsq.tasks.mixed_precision import LossPrecision

DENSE_HEADS = ('bbox_head', 'rpn_head', 'mask_head')
"""Attributes of MMDetection's detectors that hold heads which read the neck's feature maps."""


def sum_losses(losses: Mapping[str, Any]) -> Tensor:
    """Sum the loss terms as MMEngine's ``parse_losses`` does: all values and lists whose key contains ``loss``."""
    terms: list[Tensor] = []
    for name, value in losses.items():
        if 'loss' in name:
            terms.extend(value if isinstance(value, Sequence) else [value])
    return torch.stack([term.mean() for term in terms]).sum()


def num_classes(detector: nn.Module) -> int:
    """Return the number of categories of a detector.

    Raises:
        UserError: If no head has an attribute ``num_classes``.
    """
    for path in ('bbox_head', 'roi_head.bbox_head', 'mask_head', 'panoptic_head'):
        head: Any = detector
        for name in path.split('.'):
            head = getattr(head, name, None)
        if isinstance(head, nn.ModuleList):
            head = head[0]
        if head is not None and hasattr(head, 'num_classes'):
            return int(head.num_classes)
    raise UserError(f'{type(detector).__name__} has no head with `num_classes`. Set it on its bbox_head or roi_head.')


def known_num_classes(detector: nn.Module) -> int | None:
    """Return the number of categories of a detector, None if no head has it."""
    try:
        return num_classes(detector)
    except UserError:
        return None


def needs_masks(detector: nn.Module) -> bool:
    """Return whether the loss of a detector needs instance masks.

    It does if the detector has a mask head, either its own, in its RoI head, or (RTMDet-Ins) inside its box head, or if
    its queries predict masks (MaskFormer).
    """
    inside_box_head = hasattr(getattr(detector, 'bbox_head', None), 'mask_head')
    return inside_box_head or bool(getattr(detector, 'with_mask', False)) or isinstance(detector, MaskFormer)


def data_samples(
    labels: Sequence[InstanceData], image_size: tuple[int, int], device: torch.device
) -> list[DetDataSample]:
    """Convert labels to the data samples that MMDetection's detectors take.

    Args:
        labels: One entry per image with ``bboxes`` (n, 4) in xyxy pixels of the image, ``labels`` (n,), and optionally
            ``masks`` (n, H, W), bool. Masks become ``BitmapMasks`` and stay on the CPU, as in training.
        image_size: Height and width in pixels.
        device: Target device of the boxes and labels.
    """
    nothing = empty_instances().to(device)
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
                # Position of the image in its padded canvas (top, bottom, left, right), which CenterNet subtracts.
                border=(0, image_size[0], 0, image_size[1]),
            )
        )
        sample.gt_instances = InstanceData(bboxes=instances.bboxes.to(device), labels=instances.labels.to(device))
        if 'masks' in instances:
            sample.gt_instances.masks = BitmapMasks(instances.masks.numpy().astype(np.uint8), *image_size)
        sample.ignored_instances = nothing
        samples.append(sample)
    return samples


def empty_instances() -> InstanceData:
    """Return the labels of an image without objects."""
    return InstanceData(bboxes=torch.zeros((0, 4)), labels=torch.zeros((0,), dtype=torch.long))


def blank_samples(count: int, image_size: tuple[int, int], device: torch.device) -> list[DetDataSample]:
    """Return data samples without labels for ``count`` images of ``image_size`` (height, width)."""
    return data_samples([empty_instances()] * count, image_size, device)


def normalization(data_preprocessor: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the mean and standard deviation with which a detector normalizes pixels in [0, 255].

    Args:
        data_preprocessor: The detector's data preprocessor.

    Returns:
        Mean and standard deviation, each (3, 1, 1). Without normalization: 0 and 1, each (1, 1, 1).
    """
    mean, std = (
        torch.as_tensor(getattr(data_preprocessor, name, neutral)).float().view(-1, 1, 1)
        for name, neutral in (('mean', 0.0), ('std', 1.0))
    )
    return mean, std


def pixel_range(data_preprocessor: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the normalized values of black and white, each (3, 1, 1); 0 and 255 without normalization."""
    mean, std = normalization(data_preprocessor)
    return (0 - mean) / std, (255 - mean) / std


def whole_image_samples(count: int, image_size: tuple[int, int], device: torch.device) -> list[DetDataSample]:
    """Return data samples whose only object is the whole image, in the first category.

    Args:
        count: Number of images.
        image_size: Height and width in pixels.
        device: Target device of the boxes and labels.
    """
    height, width = image_size
    whole_image = InstanceData(
        bboxes=torch.tensor([[0.0, 0.0, width, height]]), labels=torch.zeros(1, dtype=torch.long)
    )
    return data_samples([whole_image] * count, image_size, device)


def semantic_criterion(detector: nn.Module) -> nn.Module | None:
    """Return the loss module of a detector's semantic branch, or None if it has no such branch.

    This loss needs a category for every pixel.
    """
    for owner in (detector, getattr(detector, 'roi_head', None)):
        head = getattr(owner, 'semantic_head', None)
        for name in ('criterion', 'loss_seg'):
            if isinstance(getattr(head, name, None), nn.Module):
                return getattr(head, name)
    return None


def add_ignored_semantic_labels(detector: nn.Module, samples: Sequence[DetDataSample]) -> None:
    """Add semantic labels that ignore every pixel, so that a semantic branch contributes nothing to the loss.

    The categories of pixels outside the objects are unknown. Moreover, the categories of a semantic branch include
    "stuff" and differ from those of the objects.

    Args:
        detector: Any detector. Without a semantic branch, nothing happens.
        samples: Changed in place. Samples that already have semantic labels keep them.
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
    """The full-precision detector with a loss and predictions for images in [0, 1].

    Args:
        detector: A trained detector. It is set to eval mode and frozen.

    Attributes:
        num_classes: Number of categories.
        needs_masks: Whether labels need instance masks and predictions contain them.
        channel_order: ``'rgb'`` or ``'bgr'``.
        note: Message for the log about the choice of this task, or None.
        is_batched: Whether :meth:`loss` computes all images of a batch at once. MMDetection computes most losses image
            by image, which takes far longer than the network on a GPU.
        loss_precision: Computes the loss under autocast; it tells whether autocast had to be turned off.
    """

    is_batched = False

    def __init__(self, detector: nn.Module) -> None:
        self.detector: Any = detector.eval().requires_grad_(False)
        accept_few_objects(detector)
        self.loss_precision = LossPrecision(self.detector)
        self._needs_standard_layout = False
        self.note: str | None = None
        self.num_classes = num_classes(detector)
        self.needs_masks = needs_masks(detector)
        preprocessor: Any = detector.data_preprocessor
        # OpenCV reads files as BGR. The images here have the channel order of the network's input.
        self.channel_order = 'rgb' if getattr(preprocessor, '_channel_conversion', False) else 'bgr'
        mean, std = normalization(preprocessor)
        self._is_normalized = bool((mean == 0).all() and (std == 255).all())
        self._mean, self._std = mean.to(self.device), std.to(self.device)
        self._shift, self._scale = (-mean / std).to(self.device), (255 / std).to(self.device)

    @property
    def device(self) -> torch.device:
        """Device of the detector."""
        return next(self.detector.parameters()).device

    def normalize(self, images: Tensor) -> Tensor:
        """Normalize images as the detector's data preprocessor does.

        Args:
            images: Shape (N, 3, H, W), in [0, 1], channels in :attr:`channel_order`.

        Returns:
            The network's input, of the same shape.
        """
        # One fused operation: on a GPU the cost is the number of passes over all pixels.
        return images if self._is_normalized else torch.addcmul(self._shift, images, self._scale)

    def denormalize(self, inputs: Tensor) -> Tensor:
        """Invert :meth:`normalize`: convert network inputs (N, 3, H, W) to images in [0, 1]."""
        return (inputs * self._std + self._mean) / 255

    def label_prior(self) -> LabelPrior:
        """Estimate statistics of the training labels from the detector's weights."""
        return label_prior(self.detector, self.num_classes)

    def data_samples(self, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> list[DetDataSample]:
        """Convert labels to MMDetection's data samples on the detector's device; see :func:`data_samples`."""
        return data_samples(labels, image_size, self.device)

    def update_samples(self, samples: Any, labels: Sequence[InstanceData], image_size: tuple[int, int]) -> bool:
        """Replace labels in place, so that a captured CUDA graph reads the new ones.

        Args:
            samples: Return value of :meth:`data_samples`. It stays unchanged if this method returns False.
            labels: The new labels, as for :meth:`data_samples`.
            image_size: Height and width in pixels.

        Returns:
            Whether the new labels were written.
        """
        return False

    def loss(self, images: Tensor, samples: Sequence[DetDataSample]) -> Tensor:
        """Compute the detector's own training loss.

        Under autocast, the network runs in 16 bits and the loss in fp32; see :mod:`mmzsq.tasks.mixed_precision`.

        Args:
            images: Shape (N, 3, H, W), in [0, 1].
            samples: Return value of :meth:`data_samples`.

        Returns:
            The sum of all loss terms, a scalar.

        Raises:
            UserError: If the loss needs a package that is not installed.
        """

        def evaluate() -> Tensor:
            copies = [_shallow_copy(sample) for sample in samples]
            add_ignored_semantic_labels(self.detector, copies)
            return sum_losses(self.detector.loss(self.normalize(images), copies))

        try:
            with frozen_train_mode(self.detector), single_process():
                return self.loss_precision(evaluate, images)
        except ImportError as error:
            raise UserError(f'the loss of {type(self.detector).__name__} needs another package: {error}') from error

    def run_network(self, images: Tensor) -> None:
        """Run the layers that feature priors observe, without a loss: backbone, neck, and dense heads with BatchNorm.

        Heads of regions and transformers are left out: they read proposals or queries, and hardly any has BatchNorm.

        Args:
            images: Shape (N, 3, H, W), in [0, 1].
        """
        with frozen_train_mode(self.detector):
            features = self.detector.extract_feat(self.normalize(images))
            for name in self._observed_heads():
                getattr(self.detector, name)(features)

    def _observed_heads(self) -> list[str]:
        heads = [
            name
            for name in DENSE_HEADS
            if isinstance(head := getattr(self.detector, name, None), nn.Module)
            and any(isinstance(layer, _BatchNorm) for layer in head.modules())
        ]
        # Beside a box head, a mask head reads more than the feature maps (CondInst), or none of them.
        return [name for name in heads if name != 'mask_head' or getattr(self.detector, 'bbox_head', None) is None]

    @torch.no_grad()
    def predict(self, images: Tensor) -> list[InstanceData]:
        """Detect objects.

        Args:
            images: Shape (N, 3, H, W), in [0, 1].

        Returns:
            One entry per image, on the CPU, with ``bboxes`` (n, 4) in xyxy pixels, ``scores`` (n,), ``labels`` (n,),
            and ``masks`` (n, H, W), bool, if the detector predicts masks. For a detector without a box head, the boxes
            are the bounding boxes of the masks.
        """
        size = (images.shape[2], images.shape[3])
        samples = blank_samples(len(images), size, self.device)
        results = self._predict(self.normalize(images), samples)
        predictions = []
        for result in results:
            found = result.pred_instances
            kept = InstanceData(bboxes=found.bboxes, scores=found.scores, labels=found.labels)
            if self.needs_masks:
                # RTMDet-Ins predicts masks of the size of its feature maps, which can exceed the image.
                kept.masks = found.masks[:, : size[0], : size[1]].bool()
                if not self.detector.with_bbox:
                    kept.bboxes = mask_boxes(kept.masks)
            predictions.append(kept.to('cpu'))
        return predictions

    def _predict(self, inputs: Tensor, samples: Sequence[DetDataSample]) -> list[DetDataSample]:
        """Run the detector's ``predict``, with inputs in the standard layout if its code takes no other one."""
        if not self._needs_standard_layout:
            try:
                return list(self.detector.predict(inputs, samples, rescale=False))
            except RuntimeError as error:
                if inputs.is_contiguous() or 'view size is not compatible' not in str(error):
                    raise
                # CenterNet calls `view` on its maps, which the layout channels_last does not allow.
                self._needs_standard_layout = True
        return list(self.detector.predict(inputs.contiguous(), samples, rescale=False))


def _shallow_copy(sample: DetDataSample) -> DetDataSample:
    """Copy a sample, so that a loss that replaces fields (RTMDet-Ins replaces masks) does not affect the next step."""
    copy = sample.new()
    copy.gt_instances = sample.gt_instances.new()
    return copy
