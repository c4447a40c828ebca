# SPDX-License-Identifier: Apache-2.0
"""Multi-box labels "in distribution": numbers and sizes of boxes follow histograms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.structures import InstanceData
from scipy import stats

from mmzsq.errors import UserError
from mmzsq.registry import LABEL_SAMPLERS
from mmzsq.synthesis import MultiBoxSampler

SIZE = (100, 200)


def sample(images: int, seed: int = 0, **arguments: Any) -> list[InstanceData]:
    generator = torch.Generator().manual_seed(seed)
    return MultiBoxSampler(**arguments).sample(images, SIZE, 5, generator)


def sides(labels: list[InstanceData]) -> torch.Tensor:
    """Widths and heights (n, 2) as shares of the image's."""
    boxes = torch.cat([instances.bboxes for instances in labels])
    return (boxes[:, 2:] - boxes[:, :2]) / torch.tensor([SIZE[1], SIZE[0]])


def test_numbers_of_boxes_follow_their_histogram() -> None:
    histogram = [30, 0, 50, 15, 5]
    labels = sample(4000, count_histogram=histogram, num_boxes=(7, 9))
    drawn = torch.tensor([len(instances) for instances in labels]).bincount(minlength=6).tolist()
    assert drawn[0] == drawn[2] == 0
    observed, expected = zip(
        *((drawn[n + 1], 40 * weight) for n, weight in enumerate(histogram) if weight), strict=True
    )
    assert stats.chisquare(observed, expected).pvalue > 0.001


def test_sizes_of_boxes_follow_their_histogram_and_are_uniform_within_a_bin() -> None:
    # Bins of a fifth.
    labels = sample(400, num_boxes=(10, 10), size_histogram=[4, 0, 2, 1, 1])
    size = sides(labels).prod(dim=1).sqrt()
    bins = (size * 5).ceil().long().clamp(1, 5) - 1
    assert (bins.bincount(minlength=5) / 4000).tolist() == pytest.approx([0.5, 0, 0.25, 0.125, 0.125], abs=0.03)
    within = (size[bins == 2] * 5 - 2).numpy()
    assert stats.kstest(within, 'uniform').pvalue > 0.001


def test_ratios_are_log_uniform_where_the_image_has_room() -> None:
    labels = sample(400, num_boxes=(10, 10), size_histogram=[0, 0, 1, 0, 0, 0, 0, 0, 0, 0], ratio=(0.25, 4.0))
    width, height = sides(labels).T
    exponent = (width / height).log2().numpy()
    assert stats.kstest(exponent, stats.uniform(-2, 4).cdf).pvalue > 0.001


def test_large_boxes_keep_their_size_and_stay_in_the_image() -> None:
    labels = sample(100, num_boxes=(10, 10), size_histogram=[0] * 9 + [1], ratio=(0.01, 100.0))
    share = sides(labels)
    assert share.max() <= 1 + 1e-5
    assert share.prod(dim=1).sqrt().min() > 0.9 - 1e-5
    # A ratio that a box of this size cannot have: the nearest that it can.
    wide = sides(sample(100, num_boxes=(10, 10), size_histogram=[0] * 9 + [1], ratio=(50.0, 100.0)))
    torch.testing.assert_close(wide[:, 0], torch.ones(1000))
    assert wide[:, 1].min() > 0.81 - 1e-5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(4, 700), st.integers(4, 700), st.integers(1, 400))
def test_boxes_lie_inside_the_image_and_are_at_least_a_pixel_wide(
    seed: int, height: int, width: int, bins: int
) -> None:
    sampler = MultiBoxSampler(num_boxes=(1, 9), size_histogram=[1] * bins, ratio=(0.1, 10.0))
    for instances in sampler.sample(5, (height, width), 3, torch.Generator().manual_seed(seed)):
        x1, y1, x2, y2 = instances.bboxes.T
        assert min(x1.min(), y1.min()) >= 0
        assert x2.max() <= width + 1e-3
        assert y2.max() <= height + 1e-3
        assert min((x2 - x1).min(), (y2 - y1).min()) >= 1 - 1e-3


def test_both_histograms_go_together_and_the_generator_alone_decides() -> None:
    arguments = dict(count_histogram=[0, 1], size_histogram=[1, 0])
    first = sample(50, seed=1, **arguments)
    assert [len(instances) for instances in first] == [2] * 50
    assert sides(first).prod(dim=1).max() <= 0.25
    torch.manual_seed(99)
    assert torch.equal(sides(sample(50, seed=1, **arguments)), sides(first))
    assert not torch.equal(sides(sample(50, seed=2, **arguments)), sides(first))


def test_without_histograms_labels_are_those_of_the_ranges() -> None:
    """The order of random draws is fixed, so that earlier sets can be reproduced."""
    (instances,) = sample(1, num_boxes=(3, 3), side=(0.1, 0.5))
    generator = torch.Generator().manual_seed(0)
    torch.randint(3, 4, (1,), generator=generator)
    size = 0.1 + torch.rand(3, 2, generator=generator) * 0.4
    corner = torch.rand(3, 2, generator=generator) * (1 - size)
    expected = torch.cat([corner, corner + size], dim=1) * torch.tensor([200, 100, 200, 100])
    torch.testing.assert_close(instances.bboxes, expected)
    assert torch.equal(instances.labels, torch.randint(5, (3,), generator=generator))


def test_an_adaptive_sampler_may_start_in_distribution() -> None:
    start = dict(type='mmzsq.MultiBoxSampler', count_histogram=[0, 0, 1])
    sampler = LABEL_SAMPLERS.build(dict(type='mmzsq.AdaptiveLabelSampler', start=start))
    labels = sampler.sample(4, SIZE, 5, torch.Generator().manual_seed(0))
    assert [len(instances) for instances in labels] == [3] * 4
    assert not sampler.uses_real_labels


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (dict(count_histogram=[]), r'MultiBoxSampler: count_histogram must be a list of weights.*\[\]'),
        (dict(count_histogram=[0, 0]), 'count_histogram must be a list of weights'),
        (dict(count_histogram=[1, -1]), 'count_histogram must be a list of weights'),
        (dict(count_histogram=[float('inf')]), 'count_histogram must be a list of weights'),
        (dict(count_histogram='12'), 'count_histogram must be a list of weights'),
        (dict(count_histogram=3), 'count_histogram must be a list of weights'),
        (dict(size_histogram=[float('nan')]), 'size_histogram must be a list of weights'),
        (dict(ratio=(2.0, 0.5)), 'ratio must be two numbers'),
        (dict(ratio=(0, 2.0)), 'ratio must start above 0'),
        (dict(ratio=(1.0, float('inf'))), 'ratio must be two numbers'),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MultiBoxSampler(**arguments)
