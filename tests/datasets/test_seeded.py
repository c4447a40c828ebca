# SPDX-License-Identifier: Apache-2.0
"""Random transforms of a sample depend on the run, the epoch and its position alone."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from mmdet.registry import DATASETS
from mmengine.runner import Runner

from mmzsq.datasets.seeded import SeededDataset, SeededSampler


@DATASETS.register_module(force=True)
class Draws(torch.utils.data.Dataset):
    """Samples of one number of each generator, after as many draws as the index, and so a different state, before."""

    metainfo = dict(classes=('a',))

    def full_init(self) -> None:
        pass

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        assert type(index) is int
        return index, random.random(), float(np.random.rand()), float(torch.rand(()))


def loader(num_workers: int, seed: int = 3) -> Any:
    cfg = dict(
        batch_size=2,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        sampler=dict(type='mmzsq.SeededSampler', shuffle=True, seed=seed),
        collate_fn=dict(type='pseudo_collate'),
        dataset=dict(type='mmzsq.SeededDataset', dataset=dict(type='Draws')),
    )
    return Runner.build_dataloader(cfg, seed=seed)


def epochs(loaded: Any, *wanted: int) -> list[list[tuple[Any, ...]]]:
    found = []
    for epoch in wanted:
        loaded.sampler.set_epoch(epoch)
        found.append([sample for batch in loaded for sample in zip(*batch, strict=True)])
    return found


@pytest.fixture(scope='module')
def whole() -> list[list[tuple[Any, ...]]]:
    return epochs(loader(0), 0, 1, 2)


def test_every_sample_has_its_own_numbers(whole: Any) -> None:
    assert [sorted(index for index, *_ in epoch) for epoch in whole] == [list(range(5))] * 3
    for generator in (1, 2, 3):
        assert len({sample[generator] for epoch in whole for sample in epoch}) == 15
    assert epochs(loader(0, seed=4), 0) != whole[:1]


def test_workers_and_epochs_before_do_not_matter(whole: Any) -> None:
    """A resumed training begins with new workers in a later epoch."""
    assert epochs(loader(2), 1, 2) == whole[1:]


def test_the_generators_of_the_process_stay_as_they_are() -> None:
    def state() -> Any:
        return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    dataset = SeededDataset(dict(type='Draws'))
    assert dataset.metainfo == dict(classes=('a',)) and len(dataset) == 5
    indices = list(SeededSampler(dataset, seed=0))
    before = state()
    first = [dataset[index] for index in indices]
    assert state() == before
    random.random(), np.random.rand(), torch.rand(())
    assert [dataset[index] for index in indices] == first
    # Without a seed, as for a plain index, the data set draws as it would without the wrapper.
    assert dataset[0] != dataset[0]


def test_processes_share_one_sequence_of_seeds() -> None:
    dataset = SeededDataset(dict(type='Draws'))
    whole = list(SeededSampler(dataset, seed=0))
    for rank in range(2):
        sampler = SeededSampler(dataset, seed=0)
        sampler.rank, sampler.world_size, sampler.num_samples, sampler.total_size = rank, 2, 3, 6
        own = list(sampler)
        expected = whole[rank::2]
        assert own[: len(expected)] == expected
        assert [index.seed for index in own][: len(expected)] == [index.seed for index in expected]
