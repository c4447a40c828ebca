# SPDX-License-Identifier: Apache-2.0
"""Detections that a detector in PyTorch shares with a file, and with itself after other rounding.

A quantized network amplifies the rounding of float32, so PyTorch does not agree with itself in another memory format.
:class:`References` computes the detections of PyTorch once for all files and runtimes that they are compared with.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torchvision.ops import box_iou

from mmzsq.quantization import quantized_layers, quantizers

NOISE = 1e-6
"""Change of the inputs of quantizers, relative to the largest, that measures how PyTorch differs from itself."""
LARGE_NOISE = 1e-5
"""The same for long sums, and for layers of few levels: a value that crosses a border there changes the outputs by
percents, but few do."""
NOISE_DRAWS = 4
"""Largest number of such changes that are drawn."""
MIN_IOU = 0.75
"""Least IoU of two boxes that are one detection."""
SCORE_THR = 0.3
"""Least score of a detection that is compared."""


class References:
    """Detections of a quantized detector in PyTorch, and those after other rounding, each computed at first use.

    Args:
        detector: The quantized detector.
        samples: Items of the test pipeline, ``dict(inputs=..., data_samples=...)``.
    """

    def __init__(self, detector: Any, samples: Sequence[Mapping[str, Any]]) -> None:
        self.detector = detector
        self.samples = samples
        self._found: dict[tuple[int, bool], list[InstanceData]] = {}
        self._own: list[InstanceData] | None = None

    @property
    def own(self) -> list[InstanceData]:
        """Detections of each sample."""
        if self._own is None:
            self._own = detect(self.detector, self.samples)
        return self._own

    def disturbed(self, draw: int, rounds_biases: bool) -> list[InstanceData]:
        """Return the detections of each sample with another rounding.

        Args:
            draw: 0 for another memory format alone. Draws 1 to :data:`NOISE_DRAWS` also change inputs of quantizers.
            rounds_biases: Whether these draws round biases as ONNX Runtime does.
        """
        key = (draw, rounds_biases and draw > 0)
        if key not in self._found:
            twin = copy.deepcopy(self.detector).to(memory_format=torch.channels_last)
            with ExitStack() as stack:
                if draw:
                    generator = torch.Generator().manual_seed(draw - 1)
                    stack.enter_context(disturbing(twin, generator))
                    stack.enter_context(_rounding_biases(twin, generator) if rounds_biases else nullcontext())
                self._found[key] = detect(twin, self.samples)
        return self._found[key]


@torch.no_grad()
def detect(model: Any, samples: Sequence[Mapping[str, Any]], score_thr: float = SCORE_THR) -> list[InstanceData]:
    """Return the detections of a detector on each sample.

    Args:
        model: A detector in PyTorch, or one that runs a file.
        samples: Items of the test pipeline.
        score_thr: Least score.
    """
    found = []
    for sample in samples:
        data = copy.deepcopy(dict(inputs=[sample['inputs']], data_samples=[sample['data_samples']]))
        instances = model.test_step(data)[0].pred_instances.cpu()
        found.append(instances[instances.scores >= score_thr])
    return found


def agreement(expected: Sequence[InstanceData], given: Sequence[InstanceData]) -> float:
    """Return the part of the detections that two detectors share.

    Args:
        expected: Detections of one detector on each image.
        given: Those of the other.

    Returns:
        2 * pairs / (detections of one + detections of the other), where a pair has one label and an IoU of at least
        0.75; 1 if there are no detections.
    """
    pairs = 0
    for first, second in zip(expected, given, strict=True):
        if len(first) and len(second):
            overlap = box_iou(first.bboxes, second.bboxes)
            same = first.labels[:, None] == second.labels
            pairs += _count_pairs(torch.where(same, overlap, torch.zeros_like(overlap)))
    total = sum(map(len, (*expected, *given)))
    return 2 * pairs / total if total else 1.0


def _count_pairs(overlap: Tensor) -> int:
    """Count pairs of an IoU of at least :data:`MIN_IOU`, each box in one at most, the best first."""
    count = 0
    while overlap.numel() and float(overlap.max()) >= MIN_IOU:
        row, column = divmod(int(overlap.argmax()), overlap.shape[1])
        overlap[row], overlap[:, column] = 0.0, 0.0
        count += 1
    return count


@contextmanager
def disturbing(detector: nn.Module, generator: torch.Generator, noise: float = NOISE) -> Iterator[None]:
    """Change the input of each activation quantizer by a part of its largest value, as another order of sums does."""
    of_weights = {layer.weight_quantizer for _, layer in quantized_layers(detector)}

    def disturb(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        change = torch.rand(x.shape, generator=generator).to(x) * 2 - 1
        return (x + change * (noise * x.abs().max()), *args[1:])

    with ExitStack() as stack:
        for _, quantizer in quantizers(detector):
            if quantizer not in of_weights:
                stack.callback(quantizer.register_forward_pre_hook(disturb).remove)
        yield


@contextmanager
def _rounding_biases(detector: nn.Module, generator: torch.Generator) -> Iterator[None]:
    """Change biases as ONNX Runtime does, which rounds them to multiples of the input's step times the weight's.

    The change is drawn at random from [-0.5, 0.5] of these products, because the bias that is rounded holds BatchNorm.
    """

    def shift(layer: Any, args: Any, output: Tensor) -> Tensor:
        weight, x = layer.weight_quantizer, layer.input_quantizer
        products = (weight.step.flatten() * x.step.flatten().mean()).expand(layer.filters().shape[0])
        noise = (torch.rand(products.shape, generator=generator) - 0.5).to(output) * products
        return output + (noise if output.dim() < 3 or isinstance(layer, nn.Linear) else noise.view(-1, 1, 1))

    with ExitStack() as stack:
        for _, layer in quantized_layers(detector):
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                stack.callback(layer.register_forward_hook(shift).remove)
        yield
