# SPDX-License-Identifier: Apache-2.0
"""Random transforms that draw the same numbers in any process and after any interruption.

Workers of a data loader live for the whole training, and their random generators go on from epoch to epoch. No
checkpoint can hold their state. Here, the generators of each sample start from the seed of the run, the epoch and the
position of the sample in it, so that neither earlier samples nor the number of workers matter.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mmdet.registry import DATASETS as MMDET_DATASETS
from mmengine.dataset import DefaultSampler
from torch.utils.data import Dataset

from mmzsq.registry import DATA_SAMPLERS, DATASETS


class SeededIndex(int):
    """Index of a sample.

    Attributes:
        seed: Numbers of at least 0 that its random transforms follow from.
    """

    seed: tuple[int, ...]


@DATA_SAMPLERS.register_module()
class SeededSampler(DefaultSampler):
    """MMEngine's ``DefaultSampler``, with a :class:`SeededIndex` for each sample."""

    def __iter__(self) -> Iterator[SeededIndex]:
        for position, index in enumerate(super().__iter__()):
            # The position in the order that all processes share.
            seeded = SeededIndex(index)
            seeded.seed = (self.seed, self.epoch, position * self.world_size + self.rank)
            yield seeded


@DATASETS.register_module()
class SeededDataset(Dataset[Any]):
    """A data set whose transforms draw from generators of each sample; needs :class:`SeededSampler`.

    This holds for transforms that use the global generators of Python, NumPy, or PyTorch on the CPU, and keep no state
    between samples. Outside, these generators stay as they are.

    Args:
        dataset: Config of any data set of MMDetection.
    """

    def __init__(self, dataset: dict[str, Any]) -> None:
        self.dataset: Any = MMDET_DATASETS.build(dataset)

    @property
    def metainfo(self) -> Any:
        """The meta information of the data set."""
        return self.dataset.metainfo

    def full_init(self) -> None:
        """Read the annotations."""
        self.dataset.full_init()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        if not isinstance(index, SeededIndex):
            return self.dataset[index]
        with _seeded(index.seed):
            return self.dataset[int(index)]


@contextmanager
def _seeded(seed: tuple[int, ...]) -> Iterator[None]:
    """Start the global generators on the CPU from a seed inside the block."""
    of_python, of_numpy, of_torch = np.random.SeedSequence(seed).generate_state(3).tolist()
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        random.seed(of_python)
        np.random.seed(of_numpy)
        # torch.manual_seed would also change the generators of all GPUs.
        torch.default_generator.manual_seed(of_torch)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
