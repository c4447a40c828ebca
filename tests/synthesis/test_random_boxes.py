# SPDX-License-Identifier: Apache-2.0
"""Random samplers follow Table 1 of the paper and use no randomness but their generator."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmengine.structures import InstanceData

from mmzsq.errors import UserError
from mmzsq.registry import LABEL_SAMPLERS
from mmzsq.synthesis import MultiBoxSampler, SingleBoxSampler, rescale_labels

SIZE = (120, 200)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shares(labels: list[InstanceData]) -> torch.Tensor:
    """All boxes (n, 4), xyxy as shares of width and height."""
    return torch.cat([instances.bboxes for instances in labels]) / torch.tensor([SIZE[1], SIZE[0], SIZE[1], SIZE[0]])


def assert_uniform(values: torch.Tensor, low: float, high: float) -> None:
    """Kolmogorov-Smirnov: the empirical distribution stays within its bound at p = 0.001."""
    ordered = ((values.double() - low) / (high - low)).sort().values
    assert ordered[0] >= -1e-5
    assert ordered[-1] <= 1 + 1e-5
    n = len(ordered)
    assert (ordered - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / n**0.5


def test_single_boxes_follow_table_1():
    labels = SingleBoxSampler().sample(4000, SIZE, 5, generator())
    assert [len(instances) for instances in labels] == [1] * 4000
    x1, y1, x2, y2 = shares(labels).T
    assert_uniform(x2 - x1, 0.2, 0.8)
    assert_uniform(y2 - y1, 0.2, 0.8)
    # The center is uniform over U(w/2, 1 - w/2).
    assert_uniform(((x1 + x2) / 2 - (x2 - x1) / 2) / (1 - (x2 - x1)), 0, 1)
    assert_uniform(((y1 + y2) / 2 - (y2 - y1) / 2) / (1 - (y2 - y1)), 0, 1)
    assert abs(torch.corrcoef(torch.stack([x2 - x1, y2 - y1]))[0, 1]) < 0.06
    counts = torch.cat([instances.labels for instances in labels]).bincount(minlength=5)
    assert counts.shape == (5,)
    assert (counts - 800).abs().max() < 5 * (4000 * 0.2 * 0.8) ** 0.5


def test_types_are_those_of_training_labels():
    (label,) = SingleBoxSampler().sample(1, SIZE, 5, generator())
    assert label.bboxes.dtype == torch.float32
    assert label.labels.dtype == torch.long
    assert label.bboxes.device.type == label.labels.device.type == 'cpu'


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**31), st.integers(8, 2000), st.integers(8, 2000), st.floats(0.01, 1.0))
def test_boxes_lie_inside_the_image(seed, height, width, low):
    sampler = MultiBoxSampler(num_boxes=(1, 4), side=(low, 1.0))
    for instances in sampler.sample(5, (height, width), 3, generator(seed)):
        x1, y1, x2, y2 = instances.bboxes.T
        assert (x1 >= 0).all()
        assert (y1 >= 0).all()
        assert (x2 <= width).all()
        assert (y2 <= height).all()
        assert (x2 > x1).all()
        assert (y2 > y1).all()


def test_multi_boxes_draw_every_count_alike():
    labels = MultiBoxSampler(num_boxes=(2, 5)).sample(4000, SIZE, 5, generator())
    counts = torch.tensor([len(instances) for instances in labels]).bincount()
    assert counts[:2].tolist() == [0, 0]
    assert counts.shape == (6,)
    assert (counts[2:] - 1000).abs().max() < 5 * (4000 * 0.25 * 0.75) ** 0.5


@pytest.mark.parametrize('sampler', [SingleBoxSampler(), MultiBoxSampler()])
def test_the_generator_alone_decides(sampler):
    before = torch.get_rng_state()
    first = shares(sampler.sample(20, SIZE, 5, generator(1)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert torch.equal(shares(sampler.sample(20, SIZE, 5, generator(1))), first)
    other = shares(sampler.sample(20, SIZE, 5, generator(2)))
    assert other.shape != first.shape or not torch.equal(other, first)


def test_blind_samplers_never_relabel():
    sampler = SingleBoxSampler()
    labels = sampler.sample(2, SIZE, 5, generator())
    assert not sampler.adaptive
    assert not sampler.uses_real_labels
    assert not any(sampler.should_relabel(iteration) for iteration in range(3000))
    same, counts = sampler.relabel(labels, labels, SIZE)
    assert same == labels
    assert (counts.added, counts.removed) == (0, 0)


@pytest.mark.parametrize(
    ('cfg', 'message'),
    [
        (dict(type='mmzsq.SingleBoxSampler', side=(0.8, 0.2)), r'SingleBoxSampler: side.*0\.8'),
        (dict(type='mmzsq.SingleBoxSampler', side=(0.2, 1.5)), 'side must be two numbers'),
        (dict(type='mmzsq.SingleBoxSampler', side=(0, 0.5)), 'side must start above 0'),
        (dict(type='mmzsq.SingleBoxSampler', side=0.5), 'side must be two numbers'),
        (dict(type='mmzsq.SingleBoxSampler', side='ab'), 'side must be two numbers'),
        (dict(type='mmzsq.MultiBoxSampler', num_boxes=(0, 3)), 'num_boxes must be two numbers'),
        (dict(type='mmzsq.MultiBoxSampler', num_boxes=(1.5, 3)), 'two integers'),
    ],
)
def test_bad_arguments_are_named(cfg, message):
    with pytest.raises(UserError, match=message):
        LABEL_SAMPLERS.build(cfg)


def test_rescaling_carries_boxes_and_masks():
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, :3, 0:2] = True
    label = InstanceData(bboxes=torch.tensor([[0.0, 0.0, 2.0, 3.0]]), labels=torch.tensor([7]), masks=masks)
    (large,) = rescale_labels([label], (4, 4), (16, 24))
    assert large.bboxes.tolist() == [[0.0, 0.0, 12.0, 12.0]]
    assert large.labels.tolist() == [7]
    expected = torch.zeros(16, 24, dtype=torch.bool)
    expected[:12, :12] = True
    # Interpolation rounds the corner that lies inside the image.
    expected[11, 10:12] = False
    assert torch.equal(large.masks[0], expected)
    # The labels that came in are as they were.
    assert label.bboxes.tolist() == [[0.0, 0.0, 2.0, 3.0]]
    assert label.masks.shape == (1, 4, 4)


def test_rescaling_and_back_returns_the_labels():
    labels = MultiBoxSampler().sample(10, SIZE, 5, generator())
    back = rescale_labels(rescale_labels(labels, SIZE, (640, 480)), (640, 480), SIZE)
    torch.testing.assert_close(shares(back), shares(labels))
