# SPDX-License-Identifier: Apache-2.0
"""How much each layer of a detector suffers from few bits, told by the teacher on the calibration set.

After Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", 2020, https://arxiv.org/abs/2001.00281: one layer
at a time is quantized, and what comes out is compared with what the float model says of the same synthetic images.
There the comparison is a KL divergence of classes; here it is the loss that the student will learn from.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mmzsq.errors import UserError
from mmzsq.qat.zero_shot_detector import ZeroShotDetector
from mmzsq.quantization import quantized_layers, set_quantization
from mmzsq.quantization.config import Bits
from mmzsq.quantization.prepare import set_bits


def measure_sensitivity(
    detector: ZeroShotDetector,
    layers: Sequence[str],
    candidates: Sequence[int],
    batches: Sequence[Any],
    init_batches: Sequence[Any],
    inputs: bool = True,
    layer_done: Callable[[], None] = lambda: None,
) -> Tensor:
    """Measure how much the loss grows when one layer has few bits and all others are float.

    No gradient is taken and nothing is learnt: with each number of bits, a layer has the first steps that it would have
    at the start of training. Augmentation is off, and losses that draw at random draw alike each time. ``detector``
    stays as it is.

    Args:
        detector: Teacher, loaded, and student, which starts from it.
        layers: Names of quantized layers in the student, L.
        candidates: Numbers of bits, 2 to 8, C.
        batches: Of the data loader, that the loss is the mean over.
        init_batches: Of the data loader, that the first steps are taken from.
        inputs: Whether a layer's input is quantized with as many bits as its weight; else it stays float.
        layer_done: Called after each layer.

    Returns:
        Growth of the loss over that of the float student, (L, C), fp64 on the CPU.

    Raises:
        UserError: If a loss is not finite.
    """
    students = {bits: _with_bits(detector, layers, bits, inputs, init_batches) for bits in candidates}
    float_losses = {bits: mean_loss(student, batches) for bits, student in students.items()}
    growth = torch.zeros(len(layers), len(candidates), dtype=torch.float64)
    for row, name in enumerate(layers):
        for column, bits in enumerate(candidates):
            layer = students[bits].student.get_submodule(name)
            layer.weight_quantizer.enabled, layer.input_quantizer.enabled = True, inputs
            loss = mean_loss(students[bits], batches)
            layer.weight_quantizer.enabled = layer.input_quantizer.enabled = False
            if not math.isfinite(loss):
                raise UserError(
                    f'the loss is {loss} with {bits} bits in {name} alone: leave {bits} out of the candidates, or give '
                    'this layer bits of its own in zsq.quantizer.overrides'
                )
            growth[row, column] = loss - float_losses[bits]
        layer_done()
    return growth


def _with_bits(
    detector: ZeroShotDetector, layers: Sequence[str], bits: int, inputs: bool, init_batches: Sequence[Any]
) -> ZeroShotDetector:
    """A copy of a detector whose layers have first steps of so many bits, with quantization off.

    One copy for each number of bits: with the steps, factors of inputs are found, and weights multiplied by them.
    """
    # The teacher is shared.
    detector = copy.deepcopy(detector)
    detector.augmentation = None
    detector.eval()
    modules = dict(quantized_layers(detector.student))
    for name in layers:
        layer = modules[name]
        # An input that keeps its bits decides with them on its factors.
        a_bits = bits if inputs else layer.input_quantizer.bits
        set_bits(layer, detector.quantization_config, Bits(bits, a_bits))
    detector.initialize_quantizers(init_batches)
    set_quantization(detector.student, False)
    return detector


@torch.no_grad()
def mean_loss(detector: ZeroShotDetector, batches: Sequence[Any]) -> float:
    """The loss that the student learns from, without gradient, the mean over batches; draws are alike each time.

    Args:
        detector: Teacher, loaded, and student, in the modes that they are to have, without augmentation.
        batches: Of the data loader.
    """
    device = next(detector.student.parameters()).device
    total = 0.0
    # The same draws each time, and none taken from what comes after.
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        for batch in batches:
            # A loss of the detector's own may write into the labels.
            data = detector.data_preprocessor(copy.deepcopy(batch), False)
            loss, _ = detector.parse_losses(detector.loss(data['inputs'], data['data_samples']))
            total += float(loss)
    return total / len(batches)
