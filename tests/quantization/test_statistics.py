# SPDX-License-Identifier: Apache-2.0
"""Activation statistics: exact extremes, mean and count, and a uniform sample."""

from __future__ import annotations

import torch

from mmzsq.quantization.statistics import CHUNK, SAMPLE_SIZE, ActivationStatistics


def _seen(batches: list[torch.Tensor]) -> ActivationStatistics:
    statistics = ActivationStatistics(torch.device('cpu'))
    for batch in batches:
        statistics.update(batch)
    return statistics


def test_extremes_mean_and_count_are_exact() -> None:
    """Over batches of different size and type; the last is summed in two parts."""
    batches = [torch.randn(2, 3, 5), torch.randn(7).bfloat16() * 9, torch.randn(CHUNK + 100)]
    everything = torch.cat([b.double().flatten() for b in batches])
    seen = _seen(batches)
    assert seen.count == everything.numel()
    assert float(seen.low) == float(everything.min())
    assert float(seen.high) == float(everything.max())
    torch.testing.assert_close(seen.mean_abs, everything.abs().mean())


def test_each_batch_has_its_share_of_the_sample() -> None:
    """Batches of 1, 2 and 5 parts fill 1, 2 and 5 eighths, whichever came first."""
    sizes = [2000, 10000, 4000]
    seen = _seen([torch.full((n,), float(n)) for n in sizes])
    for n in sizes:
        share = float((seen.sample == n).double().mean())
        assert abs(share - n / 16000) < 0.01


def test_the_sample_is_uniform_within_a_batch() -> None:
    """Quantiles of a ramp are where they should be."""
    seen = _seen([torch.linspace(0, 1, 50000).view(5, 100, 100)])
    quantiles = seen.sample.sort().values[:: SAMPLE_SIZE // 8]
    torch.testing.assert_close(quantiles, torch.linspace(0, 1, 9)[:-1], atol=0.01, rtol=0)


def test_memory_is_bounded_and_the_sample_repeats() -> None:
    """The same batches give the same bits; memory layout and batch count do not matter."""
    batches = [torch.randn(2, 4, 9, 9) for _ in range(5)]
    first = _seen(batches)
    second = _seen([b.to(memory_format=torch.channels_last) for b in batches])
    assert first.sample.numel() == SAMPLE_SIZE
    assert torch.equal(first.sample, second.sample)


def test_non_finite_values_are_noticed() -> None:
    """One NaN or infinity in any batch."""
    assert _seen([torch.randn(5)]).is_finite
    assert not _seen([torch.randn(5), torch.tensor([1.0, torch.nan])]).is_finite
    assert not _seen([torch.tensor([torch.inf]), torch.randn(5)]).is_finite
