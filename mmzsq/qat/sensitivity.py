# SPDX-License-Identifier: Apache-2.0
"""Sensitivity of each layer to its number of bits, measured against the teacher on the calibration set.

After Cai et al., "ZeroQ: A Novel Zero Shot Quantization Framework", 2020, https://arxiv.org/abs/2001.00281: one layer
at a time is quantized, and the output is compared with that of the float model on the same synthetic images. ZeroQ
compares by the KL divergence of classes; here the training loss of the student is used.
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
    on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> Tensor:
    """Measure how much the loss grows when one layer is quantized and all others are float.

    Nothing is trained: with each number of bits, a layer has the steps that it would have at the start of training.
    Augmentation is off, and losses with random numbers draw the same ones each time. ``detector`` is not changed.

    Args:
        detector: Detector with a loaded teacher and a student with the teacher's weights.
        layers: Names of L quantized layers of the student.
        candidates: C numbers of bits, 2 to 8.
        batches: Batches of the data loader over which the loss is averaged.
        init_batches: Batches of the data loader from which the quantizers are initialized.
        inputs: Whether to quantize the input of a layer with as many bits as its weight. If not, it stays float.
        on_progress: Called with a phase, the number of its steps that are done and their total number: ``'bits'``
            initialized, then ``'layers'`` measured. It is called with 0 when a phase begins, and after each step.

    Returns:
        Increase of the loss over the loss of the float student, (L, C), fp64 on the CPU.

    Raises:
        UserError: If a loss is not finite.
    """
    students, float_losses = {}, {}
    on_progress('bits', 0, len(candidates))
    for done, bits in enumerate(candidates, 1):
        students[bits] = _initialized_copy(detector, layers, bits, inputs, init_batches)
        float_losses[bits] = mean_loss(students[bits], batches)
        on_progress('bits', done, len(candidates))
    on_progress('layers', 0, len(layers))
    growth = torch.zeros(len(layers), len(candidates), dtype=torch.float64)
    for row, name in enumerate(layers):
        for column, bits in enumerate(candidates):
            layer = students[bits].student.get_submodule(name)
            layer.weight_quantizer.enabled, layer.input_quantizer.enabled = True, inputs
            loss = mean_loss(students[bits], batches)
            layer.weight_quantizer.enabled = layer.input_quantizer.enabled = False
            if not math.isfinite(loss):
                raise UserError(
                    f'the loss is {loss} with {bits} bits in {name} alone: remove {bits} from the candidates, or '
                    'set the bits of this layer in zsq.quantizer.overrides'
                )
            growth[row, column] = loss - float_losses[bits]
        on_progress('layers', row + 1, len(layers))
    return growth


def _initialized_copy(
    detector: ZeroShotDetector, layers: Sequence[str], bits: int, inputs: bool, init_batches: Sequence[Any]
) -> ZeroShotDetector:
    """Return a copy of a detector whose layers are initialized with ``bits``, with quantization off.

    Each number of bits needs a copy, because initialization also finds input scales and multiplies weights by them.
    """
    # Copies share the teacher.
    detector = copy.deepcopy(detector)
    detector.augmentation = None
    detector.eval()
    modules = dict(quantized_layers(detector.student))
    for name in layers:
        layer = modules[name]
        # An input that stays float keeps its bits, on which its input scales depend.
        a_bits = bits if inputs else layer.input_quantizer.bits
        set_bits(layer, detector.quantization_config, Bits(bits, a_bits))
    detector.initialize_quantizers(init_batches)
    set_quantization(detector.student, False)
    return detector


@torch.no_grad()
def mean_loss(detector: ZeroShotDetector, batches: Sequence[Any]) -> float:
    """Return the training loss of the student, averaged over batches, without gradient.

    Random numbers are the same in each call, and the state of the global generators does not change.

    Args:
        detector: Detector with a loaded teacher, without augmentation. The modes of its modules are kept.
        batches: Batches of the data loader.
    """
    device = next(detector.student.parameters()).device
    total = 0.0
    with torch.random.fork_rng(devices=[device] if device.type == 'cuda' else []):
        for batch in batches:
            # The detector's own loss may modify the labels.
            data = detector.data_preprocessor(copy.deepcopy(batch), False)
            loss, _ = detector.parse_losses(detector.loss(data['inputs'], data['data_samples']))
            total += float(loss)
    return total / len(batches)
