# SPDX-License-Identifier: Apache-2.0
"""Histograms of the learned steps of a quantized network."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn

from mmzsq.quantization import quantizers

BINS = 40


def steps_by_kind(model: nn.Module) -> dict[str, np.ndarray]:
    """Return the steps of all initialized quantizers.

    Args:
        model: A network with quantized layers.

    Returns:
        ``'weights'`` and ``'activations'``, one array each with the steps of all channels of all layers.
    """
    found: dict[str, list[torch.Tensor]] = dict(weights=[], activations=[])
    for name, quantizer in quantizers(model):
        if quantizer.ready:
            kind = 'weights' if name.endswith('weight_quantizer') else 'activations'
            found[kind].append(quantizer.step.detach().flatten().float())
    return {kind: torch.cat(steps).cpu().numpy() if steps else np.zeros(0) for kind, steps in found.items()}


def draw_steps(model: nn.Module) -> np.ndarray:
    """Draw a histogram of the steps of weights, and one of those of activations, on logarithmic axes.

    Args:
        model: A network with quantized layers.

    Returns:
        RGB image (H, W, 3), uint8.
    """
    figure = Figure(figsize=(8, 3), dpi=100, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    for axes, (kind, steps) in zip(figure.subplots(1, 2), steps_by_kind(model).items(), strict=True):
        positive = steps[steps > 0]
        if len(positive):
            low, high = np.log10(positive.min()), np.log10(positive.max())
            axes.hist(positive, np.logspace(low - 0.05, high + 0.05, BINS))
        axes.set_xscale('log')
        axes.set_title(f'steps of {kind} ({len(steps)})')
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]
