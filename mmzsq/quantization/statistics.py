# SPDX-License-Identifier: Apache-2.0
"""Running statistics of activations: exact minimum, maximum and mean, and a random sample of the values.

The sample consists of independent reservoirs of size one (Vitter, "Random Sampling with a Reservoir", 1985). After each
batch, every slot holds a uniform draw from all values so far. Memory use is independent of the image size and of the
number of batches. A fixed seed gives the same sample on every device.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

SAMPLE_SIZE = 2**17
# Values summed at once. A sum in fp64 copies its values; chunks of this size stay in the processor's cache.
CHUNK = 2**18


class ActivationStatistics:
    """Running statistics of one activation tensor.

    Attributes:
        sample: Random sample, (SAMPLE_SIZE,) fp32; each slot is a uniform draw from all values.
        low: Minimum, fp64 scalar tensor.
        high: Maximum, fp64 scalar tensor.
        abs_sum: Sum of absolute values, fp64 scalar tensor.
        count: Number of values.

    Args:
        device: Device of the statistics.
        seed: Seed of the sample.
    """

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        self.sample = torch.zeros(SAMPLE_SIZE, device=device)
        self.low = torch.tensor(torch.inf, dtype=torch.float64, device=device)
        self.high = torch.tensor(-torch.inf, dtype=torch.float64, device=device)
        self.abs_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.count = 0
        self._seed = seed
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def mean_abs(self) -> Tensor:
        """Mean absolute value, fp64 scalar tensor."""
        return self.abs_sum / self.count

    @property
    def is_finite(self) -> bool:
        """Whether all values were finite."""
        return bool(torch.isfinite(self.abs_sum))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Update the statistics with one batch.

        Args:
            x: Activations of any shape.
        """
        if x.numel() == 0:
            return
        values = x.detach().reshape(-1)
        low, high = values.aminmax()
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        sums = [chunk.abs().sum(dtype=torch.float64) for chunk in values.split(CHUNK)]
        self.abs_sum = self.abs_sum + torch.stack(sums).sum()
        self.count += values.numel()
        draw = torch.randint(values.numel(), (SAMPLE_SIZE,), generator=self._generator)
        replace = torch.rand(SAMPLE_SIZE, generator=self._generator) < values.numel() / self.count
        drawn = values[draw.to(values.device)].to(self.sample)
        self.sample = torch.where(replace.to(self.sample.device), drawn, self.sample)

    def gather(self) -> None:
        """Replace the statistics of this process by those of all processes.

        This is a collective operation: all ranks must call it, in the same order. Without a process group it does
        nothing.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return
        summary = torch.stack([self.low, self.high, self.abs_sum, torch.full_like(self.low, self.count)])
        own = torch.cat([summary, self.sample.double()])
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        ranks = torch.stack(everyone)
        counts = ranks[:, 3]
        self.low, self.high = ranks[:, 0].amin(), ranks[:, 1].amax()
        self.abs_sum, self.count = ranks[:, 2].sum(), int(counts.sum())
        if self.count:
            generator = torch.Generator().manual_seed(self._seed + 1)
            rank = torch.multinomial(counts.cpu(), SAMPLE_SIZE, replacement=True, generator=generator)
            slot = torch.arange(SAMPLE_SIZE)
            self.sample = ranks[rank.to(ranks.device), 4 + slot.to(ranks.device)].float()
