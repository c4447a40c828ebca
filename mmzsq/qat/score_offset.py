# SPDX-License-Identifier: Apache-2.0
"""One offset for the scores of a student, so that thresholds chosen for its teacher keep their meaning.

At few bits, all scores of a student are lower than those of its teacher. A constant on the logits moves them back. It
is added to biases of the last layers, so an exported file needs nothing new. For a head whose score is an objectness
times a class probability, the constant goes to the objectness: added to the classes, it also raises the classes that an
object does not have. It is measured on synthetic images against the teacher alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmzsq.distillation.base import Outputs
from mmzsq.distillation.dense import has_dense_predictions
from mmzsq.distillation.location_outputs import Constants
from mmzsq.distillation.location_readers import LocationReader, head_of, location_reader
from mmzsq.errors import UserError
from mmzsq.qat.paired_forward import PairedForward
from mmzsq.quantization import set_quantization

MIN_SCORE = 0.25
"""Mean score of teacher and student from which a location counts.

A bound on the teacher's score alone would select locations whose score the teacher overestimates.
"""

LARGEST_OFFSET = 4.0
HALVINGS = 24
FAINT = 0.01
"""Locations whose scores are lower in both detectors cannot count with the largest offset, and are dropped."""

TOLERANCE = 1e-3


class LocationLogits(NamedTuple):
    """Logits of the scores of a dense head at P locations.

    Attributes:
        objectness: Logits of the objectness (N, P) that the class probabilities are multiplied by, or None.
        classes: Logits of the classes, (N, P, C).
        boxes: Decoded boxes or their raw values, (N, P, K).
    """

    objectness: Tensor | None
    classes: Tensor
    boxes: Tensor

    @property
    def target(self) -> Tensor:
        """The logits that the offset is added to."""
        return self.classes if self.objectness is None else self.objectness


def score_offset(objectness: Tensor | None, classes: Tensor) -> float:
    """Return the offset at which the mean score of student and teacher agree.

    The mean is taken over locations whose mean score of both is at least :data:`MIN_SCORE` with the offset.

    Args:
        objectness: Logits of the objectness of teacher and student, (2, P), or None.
        classes: Logits of the likeliest class of each, (2, P).

    Returns:
        The offset of the student's objectness or, without it, of its classes, at most :data:`LARGEST_OFFSET`. 0 if no
        location counts.
    """

    def scores(offset: float) -> Tensor:
        moved = torch.tensor([[0.0], [offset]], device=classes.device)
        if objectness is None:
            return (classes + moved).sigmoid()
        return (objectness + moved).sigmoid() * classes.sigmoid()

    if not (scores(0.0).mean(0) >= MIN_SCORE).any():
        return 0.0
    low, high = -LARGEST_OFFSET, LARGEST_OFFSET
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        teacher, student = scores(middle)
        counted = (teacher + student) / 2 >= MIN_SCORE
        # Without any location, the student is far too low.
        if not counted.any() or (student - teacher)[counted].mean() < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


class ScoreCalibration:
    """Measures the offset of a student, and adds it to the biases of its last layers.

    Args:
        student: A quantized detector whose quantizers are initialized.
        teacher: The float detector.
        last: Names of the student's last layers.

    Raises:
        UserError: If the detector has no dense head with independent classes.
    """

    def __init__(self, student: Any, teacher: nn.Module, last: Sequence[str]) -> None:
        self.student = student
        self._last = last
        self._constants = Constants()
        self._reader: LocationReader | None = None
        taps: Sequence[str] = ('bbox_head',)
        if not has_dense_predictions(student):
            self._reader = location_reader(student)
            if self._reader is None or self._reader.softmax:
                raise UserError(
                    f'the scores of {type(student).__name__} cannot be calibrated: that needs a dense head whose '
                    'classes are independent'
                )
            taps = self._reader.taps
        self._forward = PairedForward(student, teacher, taps)

    @torch.no_grad()
    def measure(self, batches: Iterable[tuple[Tensor, Sequence[Any]]]) -> float:
        """Return the offset.

        Args:
            batches: Normalized synthetic images (N, 3, H, W), and one ``DetDataSample`` for each.

        Raises:
            UserError: Without batches.
        """
        objectness, classes = [], []
        for inputs, samples in batches:
            outputs = self._forward(inputs, samples, with_losses=False)
            pair = [self._read(outputs.teacher), self._read(outputs.student)]
            top = torch.stack([logits.classes.amax(-1).flatten() for logits in pair])
            factors = [logits.objectness for logits in pair]
            best = top.sigmoid()
            if all(factor is not None for factor in factors):
                stacked = torch.stack([factor.flatten() for factor in factors if factor is not None])
                best = best * stacked.sigmoid()
                objectness.append(stacked[:, best.amax(0) >= FAINT])
            classes.append(top[:, best.amax(0) >= FAINT])
        if not classes:
            raise UserError('the scores cannot be calibrated without images')
        return score_offset(torch.cat(objectness, 1) if objectness else None, torch.cat(classes, 1))

    def add(self, offset: float, inputs: Tensor, samples: Sequence[Any]) -> list[str]:
        """Add an offset to the logits of the student's scores.

        Args:
            offset: The constant.
            inputs: Normalized images (N, 3, H, W), to find the biases.
            samples: One ``DetDataSample`` for each.

        Returns:
            Names of the biases that have changed.

        Raises:
            UserError: If no biases move these logits, all of them, and nothing else.
        """

        def read() -> LocationLogits:
            return self._read(self._forward(inputs, samples, with_losses=False).student)

        set_quantization(self.student, False)
        try:
            biases = self._last_biases()
            chosen = {name: mask for name, mask in _exclusive(biases, read).items() if mask.any()}
            with torch.no_grad():
                before = read()
                for name, mask in chosen.items():
                    biases[name][mask] += offset
                after = read()
                moved = (after.target - before.target - offset).abs().max() < TOLERANCE
                kept = torch.allclose(after.boxes, before.boxes)
                if not (moved and kept):
                    for name, mask in chosen.items():
                        biases[name][mask] -= offset
                    raise UserError(
                        f'the scores of {type(self.student).__name__} cannot be calibrated: no biases of its last '
                        'layers move them alone'
                    )
        finally:
            set_quantization(self.student, True)
        return sorted(chosen)

    def _last_biases(self) -> dict[str, nn.Parameter]:
        found = {f'{name}.bias': getattr(self.student.get_submodule(name), 'bias', None) for name in self._last}
        return {name: bias for name, bias in found.items() if isinstance(bias, nn.Parameter)}

    def _read(self, outputs: Outputs) -> LocationLogits:
        if self._reader is None:
            maps = [scale.float() for scale in outputs['bbox_head']]
            boxes, objectness, classes = self.student.bbox_head.dense_predictions(maps)
            # A head without objectness repeats its best class in place of it.
            own = not torch.equal(objectness, classes.amax(-1))
            return LocationLogits(objectness if own else None, classes, boxes)
        read = self._reader.read(head_of(self.student, self._reader), outputs, self._constants)
        values = (*read.bboxes, *read.regressions)
        objectness = read.factor if self._reader.objectness else None
        return LocationLogits(objectness, read.classes, torch.cat(values, -1) if values else read.classes[..., :0])


def _exclusive(biases: dict[str, nn.Parameter], read: Callable[[], LocationLogits]) -> dict[str, Tensor]:
    """Return which entries of the biases move the logits of the scores, and neither boxes nor other logits."""
    names, parameters = list(biases), list(biases.values())
    wanted = [parameter.requires_grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_()
        logits = read()
        others = logits.boxes.sum() if logits.objectness is None else logits.boxes.sum() + logits.classes.sum()
        gradients = [
            torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
            for total in (logits.target.sum(), others)
        ]
    finally:
        for parameter, before in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(before)
    masks = {}
    for name, parameter, own, other in zip(names, parameters, *gradients, strict=True):
        moves, moves_others = ((torch.zeros_like(parameter) if grad is None else grad) != 0 for grad in (own, other))
        masks[name] = moves & ~moves_others
    return masks
