# SPDX-License-Identifier: Apache-2.0
"""Scale the terms of the synthesis loss by the gradients that they give to the images.

Losses of detectors differ by orders of magnitude: one head divides by the objects of the batch, another adds up all its
locations. Unscaled, such a sum outweighs the feature prior a hundredfold, and the images become noise. The gradient at
the image shows what a term does, however it adds up. Related methods balance the tasks of a network by the gradients at
shared weights (GradNorm, Chen et al. 2018).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MOMENTUM = 0.8
"""Share of the earlier measurements in a factor. The first steps on noise say little about those that follow."""


def image_gradient_norm(gradient: Tensor) -> Tensor:
    """Return the mean over images of the gradient's Euclidean norm.

    Args:
        gradient: Gradient of a term with respect to the images, (N, 3, H, W).

    Returns:
        A scalar.
    """
    return gradient.flatten(1).norm(dim=1).mean()


class GradientBalance:
    """Factors that give each term a fixed share of the gradient.

    The factor of a term is ``weight * |reference| / |gradient|``, smoothed: the logarithm is averaged over the
    measurements, of which older ones count less. All state is in tensors, so that a captured CUDA graph can measure.

    Args:
        weights: For each term, the norm of its scaled gradient divided by that of the reference.
        device: Device of the images.
    """

    def __init__(self, weights: Mapping[str, float], device: torch.device) -> None:
        self._index = {name: index for index, name in enumerate(weights)}
        self._weights = torch.tensor(list(weights.values()), dtype=torch.float32, device=device)
        self._log_sum = torch.zeros_like(self._weights)
        self._count = torch.zeros_like(self._weights)
        self.factors = torch.zeros_like(self._weights)

    @torch.no_grad()
    def measure(self, reference: Tensor, gradients: Mapping[str, Tensor]) -> None:
        """Update the factors in place.

        Args:
            reference: Gradient of the reference, (N, 3, H, W).
            gradients: Unscaled gradient of each term, of the same shape. A term whose gradient is zero or not finite,
                such as a detection loss without objects, keeps its factor.
        """
        norms = torch.stack([image_gradient_norm(gradients[name].float()) for name in self._index])
        ratio = image_gradient_norm(reference.float()) / norms
        valid = ratio.isfinite() & (ratio > 0)
        log_ratio = torch.where(valid, ratio, 1.0).log()
        kept = torch.where(valid, MOMENTUM, 1.0)
        self._log_sum.copy_(kept * self._log_sum + valid * log_ratio)
        self._count.copy_(kept * self._count + valid.float())
        mean = (self._log_sum / self._count.clamp(min=1e-6)).exp()
        self.factors.copy_(torch.where(self._count > 0, self._weights * mean, 0.0))

    def __contains__(self, name: str) -> bool:
        """Return whether a term of that name is scaled."""
        return name in self._index

    def factor(self, name: str) -> Tensor:
        """Return the factor of a term: a scalar that changes with each measurement; 0 before the first."""
        return self.factors[self._index[name]]

    def values(self) -> dict[str, float]:
        """Return the factors by term. Waits for the device."""
        return dict(zip(self._index, self.factors.tolist(), strict=True))
