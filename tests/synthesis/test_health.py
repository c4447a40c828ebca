# SPDX-License-Identifier: Apache-2.0
"""Image health: distances have the right unit, and good sets differ from bad ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn

from mmzsq.synthesis.health import (
    REFERENCE_BATCH,
    measure,
    measured_images,
    pixel_health,
    sampling_ratio,
    share_found,
    spectrum_slope,
)


class Task:
    """A network with BatchNorm, and a rule for predictions."""

    num_classes = 2
    needs_masks = False
    device = torch.device('cpu')

    def __init__(
        self, detector: nn.Module, predict: Callable[[Tensor], list[InstanceData]], order: str = 'rgb'
    ) -> None:
        self.detector = detector.eval()
        self.channel_order = order
        self._predict = predict
        self.seen: list[Tensor] = []

    @torch.no_grad()
    def predict(self, images: Tensor) -> list[InstanceData]:
        self.seen.append(images)
        self.detector(images)
        return self._predict(images)


def nothing(images: Tensor) -> list[InstanceData]:
    return [boxes([])] * len(images)


def boxes(rows: list[list[float]], labels: list[int] | None = None, score: float = 0.9) -> InstanceData:
    count = len(rows)
    return InstanceData(
        bboxes=torch.tensor(rows).view(-1, 4).float(),
        labels=torch.tensor(labels or [0] * count, dtype=torch.long),
        scores=torch.full((count,), score),
    )


def bright(images: Tensor) -> list[InstanceData]:
    """Predict the frame of the bright pixels of each image."""
    found = []
    for image in images:
        y, x = (image.mean(0) > 0.7).nonzero(as_tuple=True)
        row = [[float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1)]] if len(x) else []
        found.append(boxes(row))
    return found


def photographs(count: int, seed: int, size: int = 32, brightness: float = 0.5) -> np.ndarray:
    """Images whose positions depend on one another: each has a brightness and a contrast of its own."""
    draw = np.random.default_rng(seed)
    noise = draw.normal(size=(count, size, size, 3))
    level = brightness + 0.1 * draw.normal(size=(count, 1, 1, 1))
    contrast = 0.06 + 0.04 * draw.random((count, 1, 1, 1))
    return np.round(np.clip(level + contrast * noise, 0, 1) * 255).astype(np.uint8)


def trained_network() -> nn.Module:
    """A convolution and two BatchNorm layers with the statistics of 4000 images, the second of them in a pyramid."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16))
    values = torch.from_numpy(photographs(4000, seed=99)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        for layer in network.eval():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.copy_(values.mean((0, 2, 3)))
                layer.running_var.copy_(values.var((0, 2, 3)))
            values = layer(values)
    return network


@pytest.mark.parametrize('shift', [0.0, 0.1, 0.5])
def test_the_ratio_of_shifted_means_is_that_of_the_formula(shift: float) -> None:
    """Means of images with deviation 0.3, moments with 0.2: the squared error is 16 shift^2 / variance above 1."""
    draw = torch.Generator().manual_seed(0)
    squares = []
    for _ in range(100):
        means = 0.3 * torch.randn(48, 24, generator=draw) + shift
        moments = 1 + 0.2 * torch.randn(48, 24, generator=draw)
        squares.append(sampling_ratio(means, moments) ** 2)
    expected = 1 + REFERENCE_BATCH * shift**2 / 0.3**2 / 2
    assert np.mean(squares) == pytest.approx(expected, rel=0.05)


def test_the_ratio_does_not_depend_on_the_number_of_images() -> None:
    """A dry run of 8 images and a set of 64 are compared with the same limits."""
    draw = torch.Generator().manual_seed(0)

    def mean_square(count: int) -> float:
        sets = [
            (torch.randn(count, 64, generator=draw) + 0.7, 1 + torch.randn(count, 64, generator=draw))
            for _ in range(60)
        ]
        return float(np.mean([sampling_ratio(*one) ** 2 for one in sets]))

    assert mean_square(8) == pytest.approx(mean_square(64), rel=0.1)


def test_images_from_the_training_distribution_have_a_distance_of_one() -> None:
    """Positions of an image are not independent: by their number, the sampling error would be far smaller."""
    network = trained_network()
    distances = []
    for seed in range(12):
        health = measure(Task(network, nothing), photographs(64, seed), [boxes([])] * 64)
        assert health.batch_norm is not None and list(health.batch_norm.layers) == ['1', '4']
        distances.append([value**2 for value in health.batch_norm.layers.values()])
    assert np.mean(distances, axis=0) == pytest.approx([1, 1], abs=0.35)


def test_images_of_another_distribution_are_far_away_and_named() -> None:
    network = trained_network()
    darker = measure(Task(network, nothing), photographs(64, 0, brightness=0.3), [boxes([])] * 64)
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    noise_health = measure(Task(network, nothing), noise, [boxes([])] * 64)
    assert darker.batch_norm is not None and noise_health.batch_norm is not None
    # The shift of 0.2 is two deviations of the images' means: sqrt(1 + 16 * 4 / 2) for the first moment alone.
    assert darker.batch_norm.layers['1'] > 5.5
    assert noise_health.batch_norm.median > 20
    texts = ' '.join(noise_health.warnings)
    assert 'BatchNorm distance' in texts and 'the images are noise' in texts and 'TotalVariationPrior' in texts
    assert 'there are no labels' in texts


def test_a_layer_shared_by_pyramid_levels_is_averaged_and_regions_are_left_out() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.regions = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> Tensor:
            self.norm(images + 1)
            self.norm(images - 1)
            return self.regions(images.repeat(3, 1, 1, 1))

    images = photographs(64, 0)
    values = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    network = Shared().eval()
    network.norm.running_mean.copy_(values.mean((0, 2, 3)))
    network.norm.running_var.copy_(values.var((0, 2, 3)) + 1)
    health = measure(Task(network, nothing), images, [boxes([])] * 64)
    assert health.batch_norm is not None and list(health.batch_norm.layers) == ['norm']
    assert health.batch_norm.layers['norm'] < 1.2


def test_labels_are_found_in_all_views_and_texture_is_not() -> None:
    images = np.full((3, 64, 96, 3), 40, np.uint8)
    labels = []
    for index, image in enumerate(images):
        image[8:40, 4 + index : 36] = 230
        labels.append(boxes([[4.0 + index, 8.0, 36.0, 40.0]]))
    found = measure(Task(nn.Identity(), bright), images, labels).labels
    assert found is not None
    assert (found.count, found.image, found.mirrored, found.half_size) == (3, 1.0, 1.0, 1.0)
    # A detector that is excited at a place whatever it sees.
    fixed = Task(nn.Identity(), lambda batch: [boxes([[4.0, 8.0, 36.0, 40.0]])] * len(batch))
    health = measure(fixed, images, labels)
    assert health.labels is not None
    assert (health.labels.image, health.labels.mirrored, health.labels.half_size) == (1.0, 0.0, 0.0)
    assert any('only 0% of the labels in the mirrored images' in warning for warning in health.warnings)
    assert health.batch_norm is None


def test_a_detector_that_takes_no_half_size_gets_the_other_measures() -> None:
    def picky(images: Tensor) -> list[InstanceData]:
        if images.shape[2] < 64:
            raise RuntimeError('Kernel size can not be greater than actual input size')
        return bright(images)

    images = np.full((2, 64, 64, 3), 40, np.uint8)
    images[:, 8:40, 8:40] = 230
    found = measure(Task(nn.Identity(), picky), images, [boxes([[8.0, 8.0, 40.0, 40.0]])] * 2).labels
    assert found is not None
    assert (found.image, found.mirrored, found.half_size) == (1.0, 1.0, None)


def test_a_label_counts_if_class_overlap_and_score_fit() -> None:
    label = boxes([[0.0, 0.0, 10.0, 10.0]])
    cases = [
        (boxes([[0.0, 0.0, 10.0, 5.1]]), 1.0),
        (boxes([[0.0, 0.0, 10.0, 4.9]]), 0.0),
        (boxes([[0.0, 0.0, 10.0, 10.0]], [1]), 0.0),
        (boxes([[0.0, 0.0, 10.0, 10.0]], score=0.29), 0.0),
        (boxes([]), 0.0),
    ]
    assert [share_found([label], [found]) for found, _ in cases] == [share for _, share in cases]
    assert share_found([label, boxes([])], [boxes([]), label]) == 0.0


@pytest.mark.parametrize('order', ['rgb', 'bgr'])
def test_the_detector_sees_its_own_order_of_channels(order: str) -> None:
    task = Task(nn.Identity(), nothing, order)
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[..., 0] = 255
    measure(task, image, [boxes([])])
    assert task.seen[0][0, :, 0, 0].tolist() == ([1.0, 0.0, 0.0] if order == 'rgb' else [0.0, 0.0, 1.0])


@pytest.mark.parametrize('exponent', [0.0, 1.0, 2.0, 3.0])
def test_the_slope_is_that_of_the_spectrum(exponent: float) -> None:
    draw = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None])
    frequency[0, 0] = 1
    phase = np.exp(2j * np.pi * draw.random(frequency.shape))
    image = np.fft.irfft2(phase * frequency ** (-exponent / 2), (256, 256))
    image = 0.5 + 0.1 * image / image.std()
    assert spectrum_slope(image) == pytest.approx(-exponent, abs=0.2)


def test_a_constant_image_has_no_slope() -> None:
    assert spectrum_slope(np.full((64, 64), 0.5)) == pytest.approx(0, abs=1e-6)


def test_colors_and_contrast_of_two_halves() -> None:
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[:, :16] = (255, 0, 0)
    pixels = pixel_health(image)
    assert pixels.color == pytest.approx((0.5, 0, 0))
    # Luminance is 0.299 or 0, saturation 1 or 0.
    assert pixels.contrast == pytest.approx(0.299 / 2, abs=1e-6)
    assert pixels.saturation_spread == pytest.approx(0.5)
    assert pixels.clipped == 1.0


def test_haze_is_named() -> None:
    haze = np.full((4, 64, 64, 3), 120, np.uint8)
    warnings = measure(Task(nn.Identity(), nothing), haze, [boxes([])] * 4).warnings
    assert any('the images are haze: contrast 0.00' in warning for warning in warnings)


def test_measuring_leaves_the_random_generators_alone() -> None:
    def random(images: Tensor) -> list[InstanceData]:
        torch.rand(3)
        return nothing(images)

    state = torch.get_rng_state()
    measure(Task(nn.Identity(), random), photographs(2, 0), [boxes([])] * 2)
    assert torch.equal(torch.get_rng_state(), state)


def test_measured_images_are_spread_over_the_set() -> None:
    assert measured_images(5) == [0, 1, 2, 3, 4]
    chosen = measured_images(2000)
    assert len(chosen) == 64 and chosen[0] == 0 and chosen[-1] == 1968
    assert set(np.diff(chosen)) == {31, 32}


def test_a_health_is_plain_data() -> None:
    health: Any = measure(Task(trained_network(), nothing), photographs(4, 0), [boxes([])] * 4)
    content = health.to_dict()
    assert set(content) == {'images', 'batch_norm', 'labels', 'pixels', 'warnings'}
    assert content['batch_norm']['median'] == np.median(list(content['batch_norm']['layers'].values()))
    assert 'image health of 4 images: BatchNorm distance' in health.summary()
