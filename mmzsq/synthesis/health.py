# SPDX-License-Identifier: Apache-2.0
"""Health of synthetic images: does the detector treat them like the images that it was trained on?

Four measures, none of which needs a real image:

* BatchNorm distance. The running statistics of a BatchNorm layer are the only record of the training images. Let m_i be
  the mean of a channel over the positions of image i. Positions of one image depend on one another, so images are the
  independent samples: if all m_i have the mean of the training images, the squared error of the mean of a batch of N
  images is Var(m_i) / N in expectation. The same holds for the second moment about the running mean, whose mean is the
  running variance. The distance is the root of the measured squared error divided by this sampling error. It is about
  1 for images drawn from the training data.
* Labels that the detector finds again: in the image, in its mirror image and at half the size. Texture that only
  happens to excite the detector does not survive these views.
* Colors and contrast.
* The slope of the power spectrum: natural images have a power of about 1 / f^2 (Field 1987, "Relations between the
  statistics of natural images and the response properties of cortical cells").

:func:`measure` computes all of them, and adds a warning for those outside of the limits below. The limits lie
between sets known to be good (photographs, default synthesis) and bad (noise, haze, adversarial texture).
``benchmarks/image_health.py`` measures these sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import box_iou

from mmzsq.synthesis.batch_norm import batch_norm_layers
from mmzsq.synthesis.priors import DEAD_CHANNEL_VARIANCE
from mmzsq.synthesis.synthesizer import SynthesisTask, seeded

MAX_IMAGES = 64
"""Number of images that are measured at most, evenly spaced over the set."""

REFERENCE_BATCH = 16
"""Batch whose sampling error is the unit of the BatchNorm distance. A fixed one makes sets of all sizes comparable."""

FOUND_IOU = 0.5
FOUND_SCORE = 0.3

MAX_BATCH_NORM = 8.0
MIN_FOUND = 0.2
MIN_CONTRAST = 0.04
SLOPES = (-3.6, -1.2)
"""Limits of the warnings: largest BatchNorm distance, smallest share of labels found in mirrored images, smallest
contrast, range of slopes. Of the good sets, the worst have 5.9 (dead leaves), 58 %, 0.08, -2.8 and -2.4; the best bad
ones 11.3, 0 %, 0.02, -4.5 and 0.1."""

FEW_SHADES = 1e-8
"""Smallest power of a spectrum, for images with pixels in [0, 1]."""

_HALF_MULTIPLE = 32
_PREDICTION_BATCH = 8
_WORST_LAYERS = 3


@dataclass(frozen=True)
class BatchNormHealth:
    """Distance of features from the running statistics, 1 for images as good as drawn from the training data.

    Attributes:
        median: Median over the layers.
        layers: Distance of each layer, in order of execution.
    """

    median: float
    layers: dict[str, float]

    @property
    def worst(self) -> dict[str, float]:
        """The layers with the largest distances, at most three, from the largest on."""
        return dict(sorted(self.layers.items(), key=lambda item: -item[1])[:_WORST_LAYERS])


@dataclass(frozen=True)
class LabelHealth:
    """Share of labels that the detector finds: same category, IoU of at least 0.5, score of at least 0.3.

    Attributes:
        count: Number of labels.
        image: Share found in the images.
        mirrored: Share found in the mirrored images.
        half_size: Share found in the images at half the size; None if the detector does not take this size.
    """

    count: int
    image: float
    mirrored: float
    half_size: float | None


@dataclass(frozen=True)
class PixelHealth:
    """Colors, contrast and spectrum of images with pixels in [0, 1].

    Attributes:
        color: Mean of red, green and blue.
        saturation_spread: Standard deviation of the saturation (largest minus smallest channel) over all pixels.
        contrast: Standard deviation of the luminance within an image, median over the images.
        clipped: Share of values that are 0 or 1.
        spectrum_slope: Slope of the logarithm of the power against that of the frequency, median over the images.
    """

    color: tuple[float, float, float]
    saturation_spread: float
    contrast: float
    clipped: float
    spectrum_slope: float


@dataclass(frozen=True)
class ImageHealth:
    """Health of a set of images, see the module's docstring.

    Attributes:
        images: Number of images that were measured.
        batch_norm: None for a detector without BatchNorm, or for a single image.
        labels: None if there are no labels.
        pixels: Colors, contrast and spectrum.
        warnings: What is wrong, and which setting to change.
    """

    images: int
    batch_norm: BatchNormHealth | None
    labels: LabelHealth | None
    pixels: PixelHealth
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """Return all measures in one line for the log."""
        texts = []
        if self.batch_norm is not None:
            worst = ', '.join(f'{name} {distance:.1f}' for name, distance in self.batch_norm.worst.items())
            texts.append(
                f'BatchNorm distance {self.batch_norm.median:.1f} x the sampling error of {REFERENCE_BATCH} images '
                f'(worst: {worst})'
            )
        if self.labels is not None:
            half = self.labels.half_size
            texts.append(
                f'labels found again: {self.labels.image:.0%} in the images, {self.labels.mirrored:.0%} mirrored'
                f'{"" if half is None else f", {half:.0%} at half the size"}'
            )
        pixels = self.pixels
        texts.append(
            f'contrast {pixels.contrast:.2f}, saturation spread {pixels.saturation_spread:.2f}, '
            f'{pixels.clipped:.1%} of values clipped, spectrum 1/f^{-pixels.spectrum_slope:.1f} (photographs: 1/f^2)'
        )
        return f'image health of {self.images} images: {"; ".join(texts)}'


def measured_images(num_images: int) -> list[int]:
    """Return the indices of the images of a set to measure, evenly spaced, at most :data:`MAX_IMAGES`."""
    count = min(num_images, MAX_IMAGES)
    return [index * num_images // count for index in range(count)]


def measure(task: SynthesisTask, images: np.ndarray, labels: Sequence[InstanceData]) -> ImageHealth:
    """Measure the health of labeled images.

    The state of all random generators is kept.

    Args:
        task: The frozen detector.
        images: uint8 RGB, (N, H, W, 3), all of one size.
        labels: One entry for each image: ``bboxes`` (n, 4) xyxy in pixels, and ``labels`` (n,).
    """
    with seeded(0, task.device):
        batch_norm, found = _measure_detector(task, images, labels)
    pixels = pixel_health(images)
    return ImageHealth(len(images), batch_norm, found, pixels, tuple(_warnings(batch_norm, found, pixels)))


def sampling_ratio(means: Tensor, moments: Tensor, batch: int = REFERENCE_BATCH) -> float:
    """Return the error of batch statistics divided by their sampling error, for a batch of ``batch`` images.

    The squared error of the mean of N images is, in expectation, the squared bias plus the variance between images
    divided by N. Both are estimated without bias from the given images, and summed over channels before they are
    divided, so that channels with little variance between images do not dominate. The result is the root of the mean
    of two ratios, that of the first and that of the second moment.

    Args:
        means: Mean over the positions of each image, minus the running mean, divided by the running deviation; shape
            (N, C), N of at least 2.
        moments: Mean of the squared deviation from the running mean, divided by the running variance; (N, C).
        batch: Number of images of the batch.

    Returns:
        1 in expectation of its square if the running statistics are those of the images' distribution, else above. It
        may be below 1 by chance, or for images that were optimized to match the statistics.
    """
    ratios = []
    for values, expected in ((means, 0.0), (moments, 1.0)):
        values = values.double()
        variance = values.var(0)
        bias = (values.mean(0) - expected).square() - variance / len(values)
        ratios.append(1 + batch * bias.sum() / variance.sum().clamp(min=1e-12))
    return float(torch.stack(ratios).mean().clamp(min=0).sqrt())


def pixel_health(images: np.ndarray) -> PixelHealth:
    """Measure colors, contrast and spectrum of images (N, H, W, 3), uint8 RGB."""
    colors, saturations, squares, contrasts, clipped, slopes = [], [], [], [], [], []
    for image in images:
        pixels = image.astype(np.float32) / 255
        colors.append(pixels.mean((0, 1)))
        saturation = pixels.max(2) - pixels.min(2)
        saturations.append(saturation.mean())
        squares.append(np.square(saturation).mean())
        clipped.append(((image == 0) | (image == 255)).mean())
        luminance = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
        contrasts.append(luminance.std())
        slopes.append(spectrum_slope(luminance))
    red, green, blue = np.mean(colors, axis=0).tolist()
    return PixelHealth(
        color=(red, green, blue),
        saturation_spread=float(np.sqrt(max(np.mean(squares) - np.mean(saturations) ** 2, 0))),
        contrast=float(np.median(contrasts)),
        clipped=float(np.mean(clipped)),
        spectrum_slope=float(np.median(slopes)),
    )


def spectrum_slope(luminance: np.ndarray) -> float:
    """Fit a power law to the radially averaged power spectrum of an image.

    Args:
        luminance: Shape (H, W), in [0, 1].

    Returns:
        The exponent between 4 cycles per shorter side and 0.35 cycles per pixel: 0 for white noise, about -2 for
        photographs, and 0 for a constant image.
    """
    height, width = luminance.shape
    window = np.hanning(height)[:, None] * np.hanning(width)[None]
    power = np.square(np.abs(np.fft.rfft2((luminance - luminance.mean()) * window)))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    # Rings of equal width on a logarithmic scale count equally in the fit.
    edges = np.geomspace(4 / min(height, width), 0.35, 17)
    ring = np.digitize(frequency, edges) - 1
    inside = (ring >= 0) & (ring < len(edges) - 1)
    count = np.bincount(ring[inside], minlength=len(edges) - 1)
    total = np.bincount(ring[inside], power[inside], len(edges) - 1)
    center = np.bincount(ring[inside], frequency[inside], len(edges) - 1)
    full = count > 0
    if full.sum() < 2:
        return 0.0
    mean_power = total[full] / count[full] + FEW_SHADES
    return float(np.polyfit(np.log(center[full] / count[full]), np.log(mean_power), 1)[0])


def share_found(labels: Sequence[InstanceData], predictions: Sequence[InstanceData]) -> float:
    """Return the share of labels that are among the predictions, see :class:`LabelHealth`.

    Args:
        labels: For each image ``bboxes`` (n, 4) and ``labels`` (n,), on the CPU; at least one label in all.
        predictions: For each image ``bboxes`` (m, 4) in the same unit, ``scores`` (m,) and ``labels`` (m,).
    """
    found = 0
    for known, predicted in zip(labels, predictions, strict=True):
        same = known.labels[:, None] == predicted.labels[None]
        overlaps = box_iou(known.bboxes.float(), predicted.bboxes.float()) >= FOUND_IOU
        found += int((same & overlaps & (predicted.scores >= FOUND_SCORE)[None]).any(1).sum())
    return found / sum(len(known.labels) for known in labels)


def _measure_detector(
    task: SynthesisTask, images: np.ndarray, labels: Sequence[InstanceData]
) -> tuple[BatchNormHealth | None, LabelHealth | None]:
    boxes = [InstanceData(bboxes=known.bboxes.cpu(), labels=known.labels.cpu()) for known in labels]
    count = sum(len(known.labels) for known in boxes)
    height, width = images.shape[1:3]
    half = _half(height), _half(width)
    factor = torch.tensor([half[1] / width, half[0] / height] * 2)
    mirrored_boxes = [
        InstanceData(bboxes=torch.stack((width - x2, y1, width - x1, y2), 1), labels=known.labels)
        for known in boxes
        for x1, y1, x2, y2 in [known.bboxes.unbind(1)]
    ]
    half_boxes = [InstanceData(bboxes=known.bboxes * factor, labels=known.labels) for known in boxes]
    predictions: dict[str, list[InstanceData]] = dict(image=[], mirrored=[], half_size=[])
    takes_half = True
    with _image_statistics(task.detector) as statistics:
        for batch in _batches(task, images):
            predictions['image'] += statistics.observe(task, batch)
            if not count:
                continue
            predictions['mirrored'] += task.predict(batch.flip(3))
            if takes_half:
                try:
                    smaller = F.interpolate(batch, half, mode='bilinear', antialias=True)
                    predictions['half_size'] += task.predict(smaller)
                except (RuntimeError, ValueError, AssertionError, IndexError):
                    # The network or its head needs larger images.
                    takes_half = False
    batch_norm = statistics.health()
    if not count:
        return batch_norm, None
    found = LabelHealth(
        count=count,
        image=share_found(boxes, predictions['image']),
        mirrored=share_found(mirrored_boxes, predictions['mirrored']),
        half_size=share_found(half_boxes, predictions['half_size']) if takes_half else None,
    )
    return batch_norm, found


def _half(side: int) -> int:
    return max(round(side / 2 / _HALF_MULTIPLE), 1) * _HALF_MULTIPLE


def _batches(task: SynthesisTask, images: np.ndarray) -> Iterator[Tensor]:
    """Yield batches of images in [0, 1] on the detector's device, with the channels in its order."""
    for first in range(0, len(images), _PREDICTION_BATCH):
        chosen = np.ascontiguousarray(images[first : first + _PREDICTION_BATCH])
        batch = torch.from_numpy(chosen).permute(0, 3, 1, 2).to(task.device).float() / 255
        yield batch if task.channel_order == 'rgb' else batch.flip(1)


class _ImageStatistics:
    """Moments of each image at the input of each BatchNorm layer."""

    def __init__(self, detector: nn.Module) -> None:
        self.names = {layer: name for name, layer in detector.named_modules() if isinstance(layer, _BatchNorm)}
        self.count = 0
        self.runs: dict[_BatchNorm, list[tuple[Tensor, Tensor]]] = {}
        self.batches: dict[_BatchNorm, list[tuple[Tensor, Tensor]]] = {}

    def observe(self, task: SynthesisTask, images: Tensor) -> list[InstanceData]:
        """Predict on a batch and store the moments of its images; returns the predictions."""
        self.count = len(images)
        try:
            predictions = task.predict(images)
        finally:
            self.count = 0
        for layer, runs in self.runs.items():
            # The running statistics of a layer shared between pyramid levels are averages over the levels, too.
            means, moments = (torch.stack(values).mean(0).cpu() for values in zip(*runs, strict=True))
            self.batches.setdefault(layer, []).append((means, moments))
        self.runs.clear()
        return predictions

    def record(self, layer: _BatchNorm, inputs: tuple[Any, ...]) -> None:
        """Hook: store the moments of one run, unless its samples are regions instead of images."""
        features: Tensor = inputs[0]
        if not self.count or len(features) != self.count or features.dim() < 3:
            return
        assert layer.running_mean is not None and layer.running_var is not None
        mean, variance = layer.running_mean.float(), layer.running_var.float()
        live = variance > DEAD_CHANNEL_VARIANCE
        shape = (1, -1, 1)
        centered = (features.detach().flatten(2).float() - mean.view(shape))[:, live]
        self.runs.setdefault(layer, []).append(
            (centered.mean(2) / variance[live].sqrt(), centered.square().mean(2) / variance[live])
        )

    def health(self) -> BatchNormHealth | None:
        """Return the distances; None without a layer that ran, or with a single image."""
        distances = {}
        for layer, batches in self.batches.items():
            means, moments = (torch.cat(values) for values in zip(*batches, strict=True))
            if len(means) > 1 and means.numel():
                distances[self.names[layer]] = round(sampling_ratio(means, moments), 4)
        if not distances:
            return None
        return BatchNormHealth(float(np.median(list(distances.values()))), distances)


@contextmanager
def _image_statistics(detector: nn.Module) -> Iterator[_ImageStatistics]:
    statistics = _ImageStatistics(detector)
    handles = [layer.register_forward_pre_hook(statistics.record) for layer in batch_norm_layers(detector)]
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def _warnings(batch_norm: BatchNormHealth | None, labels: LabelHealth | None, pixels: PixelHealth) -> Iterator[str]:
    if batch_norm is not None and batch_norm.median > MAX_BATCH_NORM:
        yield (
            f'features are unlike those of the training images: BatchNorm distance {batch_norm.median:.1f}, at most '
            f'{MAX_BATCH_NORM:g} in good sets. Raise iterations of zsq.synthesis.synthesize and refine, raise the '
            'weight of BNStatisticsPrior in zsq.synthesis.priors, or lower zsq.synthesis.detection_weight'
        )
    if labels is None:
        yield 'there are no labels: lower zsq.label_sampler.score_thr, and check the checkpoint'
    elif labels.mirrored < MIN_FOUND:
        yield (
            f'the teacher finds only {labels.mirrored:.0%} of the labels in the mirrored images: objects are missing '
            'or mere texture. Raise iterations of zsq.synthesis.relabel and refine, or raise '
            'zsq.synthesis.detection_weight'
        )
    if pixels.contrast < MIN_CONTRAST:
        yield (
            f'the images are haze: contrast {pixels.contrast:.2f}, at least {MIN_CONTRAST:g} in good sets. Lower '
            'zsq.synthesis.detection_weight, or the weight of TotalVariationPrior in zsq.synthesis.priors'
        )
    low, high = SLOPES
    if pixels.spectrum_slope > high:
        yield (
            f'the images are noise: their spectrum falls as 1/f^{-pixels.spectrum_slope:.1f}, that of photographs as '
            '1/f^2. Raise the weight of TotalVariationPrior in zsq.synthesis.priors, or iterations of '
            'zsq.synthesis.synthesize'
        )
    elif pixels.spectrum_slope < low:
        yield (
            f'the images are blurred: their spectrum falls as 1/f^{-pixels.spectrum_slope:.1f}, that of photographs as '
            '1/f^2. Lower the weight of TotalVariationPrior in zsq.synthesis.priors'
        )
