# SPDX-License-Identifier: Apache-2.0
"""Sampler that takes the first images of a data set."""

from __future__ import annotations

from collections.abc import Iterator, Sized

from torch.utils.data import Sampler

from mmzsq.registry import DATA_SAMPLERS


@DATA_SAMPLERS.register_module()
class FirstImages(Sampler[int]):
    """Takes the first images of any data set, in order, in one process.

    Args:
        dataset: The data set.
        count: Number of images; all if the data set has fewer.
        seed: Ignored: MMEngine passes it to every sampler.
    """

    def __init__(self, dataset: Sized, count: int, seed: int | None = None) -> None:
        self.count = min(count, len(dataset))

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count))

    def __len__(self) -> int:
        return self.count
