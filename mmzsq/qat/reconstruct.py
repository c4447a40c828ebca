# SPDX-License-Identifier: Apache-2.0
"""Reconstruct a student unit by unit, see :mod:`mmzsq.quantization.reconstruction`.

Each unit gets the inputs that it has in the student, whose earlier units are reconstructed already, and learns to
return what it returns in the float network. Student and float network run as in training: in a two-stage detector, both
see the regions of the float network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmzsq.qat.paired_forward import build_paired_forward
from mmzsq.qat.zero_shot_detector import ZeroShotDetector
from mmzsq.quantization import LSQ, quantized_layers, quantizers, set_quantization
from mmzsq.quantization.reconstruction import Call, Errors, Reconstruction, recording_calls
from mmzsq.quantization.units import find_units

Images = tuple[Tensor, Sequence[Any]]
"""Normalized images (N, 3, H, W), and a ``DetDataSample`` of each."""


class Reconstructor(NamedTuple):
    """Settings of a reconstruction.

    Attributes:
        images: Largest number of images.
        batch_size: Images of one iteration.
        iterations: Iterations of each unit.
        cache_gib: Memory for inputs and outputs of one unit in GiB.
        seed: Seed of the order of images.
    """

    images: int
    batch_size: int
    iterations: int
    cache_gib: float
    seed: int

    def split(self, batches: Sequence[Images]) -> list[Images]:
        """Split batches into those of one iteration each, and leave out images beyond the limit."""
        pieces: list[Images] = []
        left = self.images
        for inputs, samples in batches:
            for start in range(0, min(len(inputs), left), self.batch_size):
                end = min(start + self.batch_size, left, len(inputs))
                pieces.append((inputs[start:end], samples[start:end]))
            left = max(left - len(inputs), 0)
        return pieces

    @torch.no_grad()
    def run(
        self,
        detector: ZeroShotDetector,
        batches: Iterable[Any],
        on_unit: Callable[[str, Errors, int, int], None] = lambda name, errors, done, total: None,
    ) -> None:
        """Reconstruct all units of a student in place.

        Args:
            detector: Detector whose student has initialized quantizers and the weights of the float one.
            batches: Batches of the data loader to learn from.
            on_unit: Called after each unit with its name, its errors, the number of units done, and that of all.
        """
        preprocessed = [detector.data_preprocessor(batch, False) for batch in batches]
        training = detector.training
        detector.eval()
        pieces = self.split([(data['inputs'], data['data_samples']) for data in preprocessed])
        self._reconstruct(detector.student, pieces, on_unit)
        detector.train(training)

    def _reconstruct(
        self, student: nn.Module, pieces: Sequence[Images], on_unit: Callable[[str, Errors, int, int], None]
    ) -> None:
        original = copy.deepcopy(student)
        set_quantization(original, False)
        whole = build_paired_forward(student, original, [name for name, _ in quantized_layers(student)])
        units = find_units(student, lambda: whole(*pieces[0], False))
        modes = {module: module.training for module in student.modules()}
        generator = torch.Generator().manual_seed(self.seed)
        learned: set[LSQ] = set()
        for done, name in enumerate(units, 1):
            unit = student.get_submodule(name)
            calls = self._record(name, student, original, pieces)
            errors = Reconstruction(unit, calls, learned, generator).run(self.iterations)
            learned.update(quantizer for _, quantizer in quantizers(unit))
            for module, training in modes.items():
                module.training = training
            on_unit(name, errors, done, len(units))

    def _record(self, name: str, student: nn.Module, original: nn.Module, pieces: Sequence[Images]) -> list[Call]:
        """Return the calls of a unit, of as many images as the memory allows and at least one batch."""
        paired = build_paired_forward(student, original, [name])
        unit, float_unit = student.get_submodule(name), original.get_submodule(name)
        calls: list[Call] = []
        used = 0
        for inputs, samples in pieces:
            with recording_calls(unit, float_unit) as recorded:
                paired(inputs, samples, False)
            calls += recorded
            used += sum(call.nbytes for call in recorded)
            if used * (1 + 1 / max(len(calls), 1)) > self.cache_gib * 2**30:
                break
        return calls
